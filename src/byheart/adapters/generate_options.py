"""Which options of Hugging Face's `generate` a recurrent memory can honour."""

from collections.abc import Iterable
from typing import Any

from byheart.adapters.recurrent import RecurrentMemory
from byheart.adapters.recurrent_checks import without_attached
from byheart.models.decoder import Decoder

__all__ = ["AT_ENDS", "check_answer_options", "check_decoder_options"]

# they look at the scores of one token, so that it does not matter where its segment began
_OF_ONE_TOKEN = frozenset({
    "do_sample", "temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff",
    "eta_cutoff", "suppress_tokens", "renormalize_logits", "remove_invalid_values", "eos_token_id",
    "pad_token_id", "bos_token_id", "use_cache", "cache_implementation", "cache_config",
    "disable_compile", "return_dict_in_generate",
})  # fmt: skip
# about sequences of tokens: honoured if all of these are of one token
_OF_SEQUENCES = ("bad_words_ids", "sequence_bias")
# their effect would stop at the end of a segment; and their values without one
_OF_WHOLE_TEXT = {
    "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "length_penalty": 1.0,
    "diversity_penalty": 0.0, "early_stopping": False, "low_memory": False, "penalty_alpha": None,
    "min_length": 0, "min_new_tokens": 0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None, "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0, "guidance_scale": 1.0, "watermarking_config": None,
    "stop_strings": None, "max_time": None, "max_length": None, "stopping_criteria": None,
    "streamer": None, "logits_processor": None, "prefix_allowed_tokens_fn": None,
    "constraints": None, "force_words_ids": None, "assistant_model": None,
    "prompt_lookup_num_tokens": None, "prefill_chunk_size": None, "dola_layers": None,
    "token_healing": False,
}  # fmt: skip
AT_ENDS = ("forced_bos_token_id", "forced_eos_token_id", "begin_suppress_tokens")
"""Options about the first or last new token, which every segment would take for its own. Those of
the model's own config are left out, because it would force an end into every segment."""
_OF_DECODERS = frozenset({"sampling", "generator", "eos_token_id", "pad_token_id"})
# they look at the text that was read, of which only the memory is left
_OF_ENCODER_TEXT = ("encoder_no_repeat_ngram_size", "encoder_repetition_penalty")


def check_answer_options(memory_model: RecurrentMemory, options: dict[str, Any]) -> None:
    """Refuse options that an encoder-decoder with recurrent memory would not honour.

    Args:
        memory_model: The model.
        options: Of Hugging Face's `generate`.

    Raises:
        ValueError: If there is such an option, here or in the model's own `generation_config`.
    """
    # transformers takes what is not given from the config given, and then from the model's own
    sources = (options.get("generation_config"), memory_model.model.generation_config)
    for name in _OF_ENCODER_TEXT:
        neutral = _OF_WHOLE_TEXT[name]
        values = (options.get(name), *(getattr(source, name, None) for source in sources))
        value = next((value for value in values if value is not None), None)
        if value is not None and value != neutral:
            msg = (
                f"{name} cannot be honoured, got {value}: of the text before its last segment "
                f"only the memory is left. Use {name}={neutral}."
            )
            raise ValueError(msg)


def check_decoder_options(memory_model: RecurrentMemory, options: dict[str, Any]) -> None:
    """Refuse options that would not be honoured where a new segment begins.

    Args:
        memory_model: A decoder with recurrent memory.
        options: Of Hugging Face's `generate`, or for a `Decoder` its own.

    Raises:
        ValueError: If there is such an option, here or in the model's own `generation_config`, or
            the model's segments are not counted from the start of a text.
    """
    is_decoder = isinstance(memory_model.model, Decoder)
    if is_decoder:
        _require_known(options, _OF_DECODERS, "sampling=SamplingConfig(...) says how.")
    if options.get("generation_config") is not None:
        msg = "generation_config cannot be passed to a decoder: give its options by their names."
        raise ValueError(msg)
    if not is_decoder:
        _check_hugging_face(without_attached(memory_model.model).generation_config, options)
    if memory_model.memory_config.alignment != "left":
        msg = (
            "alignment must be 'left' to generate: new tokens end a text, so its segments must be "
            f"counted from its start; got {memory_model.memory_config.alignment!r}."
        )
        raise ValueError(msg)


def _check_hugging_face(defaults: Any, options: dict[str, Any]) -> None:
    known = _OF_ONE_TOKEN.union(_OF_SEQUENCES, _OF_WHOLE_TEXT, AT_ENDS, {"generation_config"})
    _require_known(options, known, "Leave it out.")
    # what is not given may be the model's own; its max_length gives way to max_new_tokens
    for name, neutral in _OF_WHOLE_TEXT.items():
        own = None if name == "max_length" else getattr(defaults, name, None)
        value = options.get(name, own)
        if value is not None and value != neutral:
            msg = (
                f"{name} cannot be honoured across segments by a decoder with recurrent memory, "
                f"got {value}; use {name}={neutral}. For several continuations repeat the rows of "
                "input_ids, or of the state with select_rows."
            )
            raise ValueError(msg)
    for name in _OF_SEQUENCES:
        value = options.get(name, getattr(defaults, name, None))
        if value and any(len(tokens) > 1 for tokens in _sequences(value)):
            msg = (
                f"{name} must be about single tokens for a decoder with recurrent memory, got "
                f"{value}: a longer sequence may begin in the segment before. Leave it out."
            )
            raise ValueError(msg)
    for name in AT_ENDS:
        if options.get(name) is not None:
            msg = (
                f"{name} must be None for a decoder with recurrent memory, got {options[name]}: "
                "every segment would begin or end with it. Leave it out."
            )
            raise ValueError(msg)


def _require_known(options: dict[str, Any], known: Iterable[str], remedy: str) -> None:
    unknown = sorted(options.keys() - known)
    if unknown:
        own = sorted(_OF_DECODERS) if "sampling" in known else sorted(_OF_ONE_TOKEN)
        msg = f"generate takes the options {', '.join(own)}, got {unknown[0]}. {remedy}"
        raise ValueError(msg)


def _sequences(value: Any) -> list[Any]:
    """List the sequences of tokens that an option is about.

    Args:
        value: Lists of tokens, biases by tuples of them, or pairs of the two.

    Returns:
        The tokens of each.
    """
    if isinstance(value, dict):
        return list(value)
    return [entry[0] if isinstance(entry[0], (list, tuple)) else entry for entry in value]
