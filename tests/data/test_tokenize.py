import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from byheart.data import tokenize
from byheart.data.tokenize import BpeTokenizer, ByteTokenizer, Tokenizer, load_tokenizer
from byheart.errors import DataError

TEXTS = [
    "Call me Ishmael. Some years ago, never mind how long precisely, having little money",
    "def append(self, keys: Tensor) -> None:\n    self._keys.append(keys)\n\n\nclass Ring:\n",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 这是一个记忆。",
]
BPE = BpeTokenizer.train(TEXTS, vocab_size=353)
TOKENIZERS = pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["bytes", "bpe"])

# where a splitter could go wrong: white space of every kind, quotes, numbers, special tokens
tricky = st.lists(
    st.sampled_from([
        " ", "  ", "\n", "\n\n", " \n", "\r\n", "\t", "\x0b", "\x1c", "\x85", "\xa0", "\u2003",
        "\u3000", "\u200b", "a", "keys", "É", "记忆", "'s", "'", "'re", "1", "23", "½", "٣", ".",
        "//", "_", "<|start|>", "\U0001f600", "\u0301", "\0",
    ]),
    max_size=40,
).map("".join)  # fmt: skip


@TOKENIZERS
@given(st.text() | tricky)
def test_decoding_gives_back_every_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids.tolist()) == text
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    assert tokenizer.start_id not in ids


@TOKENIZERS
@given(texts=st.lists(tricky, max_size=5))
def test_a_batch_is_encoded_like_its_texts(tokenizer, texts):
    batch = tokenizer.encode_batch(texts)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text).tolist() for text in texts]


@TOKENIZERS
def test_the_start_token_leaves_no_trace_in_the_text(tokenizer):
    ids = [tokenizer.start_id, *tokenizer.encode("Ring").tolist(), tokenizer.start_id]
    assert tokenizer.decode(ids) == "Ring"


@TOKENIZERS
def test_both_are_tokenizers(tokenizer):
    assert isinstance(tokenizer, Tokenizer)


def test_bytes_need_no_vocabulary():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("hü").tolist() == [104, 195, 188]
    assert tokenizer.decode([104, 195]) == "h\ufffd"
    assert (tokenizer.vocab_size, tokenizer.start_id) == (257, 256)


def test_training_learns_frequent_words_and_is_repeatable():
    assert BPE.encode("keys").size < len("keys")
    assert BpeTokenizer.train(iter(TEXTS), 353).fingerprint == BPE.fingerprint
    assert BpeTokenizer.train(TEXTS, 307).fingerprint != BPE.fingerprint


def test_the_vocabulary_is_at_most_as_large_as_asked_for():
    assert BPE.vocab_size == 353
    assert BpeTokenizer.train(["ab ab ab"], 997).vocab_size == 259
    assert BpeTokenizer.train(TEXTS, 257).vocab_size == 257
    with pytest.raises(ValueError, match=r"at least 257 .*, got 256"):
        BpeTokenizer.train(TEXTS, 256)


@pytest.mark.parametrize("texts", [[], [""], ["\n", " "]])
def test_a_vocabulary_is_not_learned_from_nothing(texts):
    with pytest.raises(DataError, match="documents with text, got none but white space"):
        BpeTokenizer.train(texts, 300)


@pytest.fixture
def short_pieces(monkeypatch):
    monkeypatch.setattr(tokenize, "_PIECE_CHARS", 3)
    monkeypatch.setattr(tokenize, "_PIECES_AT_ONCE", 2)


PIECES = [
    *TEXTS,
    "a  \n b \n\n  c 's 12 'll..",
    "x\x1c y\xa0 z\x85\nq é\n",
    "\n\n\n   \nx\n",
    "it's  a'b 5 'c",
]


@pytest.mark.parametrize("text", PIECES)
def test_a_text_encoded_in_pieces_gives_the_ids_of_the_whole(text, short_pieces):
    assert len(list(tokenize._cut_at_spaces(text))) > 1
    whole = BPE._tokenizer.encode(text, add_special_tokens=False).ids
    assert BPE.encode(text).tolist() == whole


@given(tricky)
def test_pieces_are_split_like_the_whole(text):
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    cuts = [border.start() for border in tokenize._PIECE_BORDER.finditer(text)]
    bounds = [0, *cuts, len(text)]
    pieces = [text[i:j] for i, j in itertools.pairwise(bounds)]
    split = [word for piece in pieces for word, _ in splitter.pre_tokenize_str(piece)]
    assert split == [word for word, _ in splitter.pre_tokenize_str(text)]


def test_training_does_not_depend_on_the_pieces(short_pieces):
    assert BpeTokenizer.train(TEXTS, 353).fingerprint == BPE.fingerprint


def hugging_face_file(tmp_path, special, *, normalizer=None):
    """A tokenizer as pretrained models ship it: adds specials, truncates, pads."""
    tokenizer = HuggingFaceTokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(special_tokens=["[UNK]", *special], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{special[0]} $A {special[0]}",
        special_tokens=[(special[0], tokenizer.token_to_id(special[0]))],
    )
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=11)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_a_hugging_face_tokenizer_adds_cuts_and_pads_nothing(tmp_path):
    path = hugging_face_file(tmp_path, ["<s>"])
    library = HuggingFaceTokenizer.from_file(str(path))
    library.no_truncation()
    library.no_padding()
    text = "having little money having little money"
    expected = library.encode(text, add_special_tokens=False).ids
    assert len(expected) > 5
    assert BpeTokenizer.from_file(path).encode(text).tolist() == expected


@pytest.mark.parametrize(
    ("special", "start"),
    [
        (["</s>", "<s>"], "<s>"),
        (["<|endoftext|>", "<|start|>"], "<|start|>"),
        (["[SEP]", "[CLS]"], "[CLS]"),
        (["[SEP]"], None),
    ],
)
def test_the_start_token_goes_by_many_names(tmp_path, special, start):
    path = hugging_face_file(tmp_path, special)
    expected = start and HuggingFaceTokenizer.from_file(str(path)).token_to_id(start)
    assert BpeTokenizer.from_file(path).start_id == expected


def test_only_tokenizers_that_split_at_spaces_are_cut(tmp_path):
    def can_cut(**changes):
        return BpeTokenizer(json.dumps(BPE._settings | changes))._can_cut

    assert can_cut()
    splitter = BPE._settings["pre_tokenizer"]
    assert not can_cut(pre_tokenizer=splitter | {"add_prefix_space": True})
    assert not can_cut(pre_tokenizer=splitter | {"use_regex": False})
    assert not can_cut(pre_tokenizer=None)
    assert not can_cut(added_tokens=[BPE._settings["added_tokens"][0] | {"special": False}])
    lower = hugging_face_file(tmp_path, ["<s>"], normalizer=normalizers.Lowercase())
    assert not BpeTokenizer.from_file(lower)._can_cut


@TOKENIZERS
def test_a_saved_tokenizer_is_loaded_equal(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "deep" / "folder")
    loaded = load_tokenizer(tmp_path / "deep" / "folder")
    assert type(loaded) is type(tokenizer)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode(TEXTS[2]).tolist() == tokenizer.encode(TEXTS[2]).tolist()


def test_tokenizers_are_loaded_by_name_folder_or_file(tmp_path):
    assert isinstance(load_tokenizer("bytes"), ByteTokenizer)
    BPE.save(tmp_path)
    assert load_tokenizer(tmp_path / "tokenizer.json").fingerprint == BPE.fingerprint
    # the library reads it too
    library = HuggingFaceTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert library.encode(TEXTS[0]).ids == BPE.encode(TEXTS[0]).tolist()


def test_what_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"must be 'bytes', a folder with tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json must be a Hugging Face tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "byte_tokenizer.json").write_text('{"kind": "bytes", "format": 2}')
    with pytest.raises(DataError, match=r"byte_tokenizer\.json must hold .*'format': 1.*, got"):
        load_tokenizer(tmp_path)


def test_ids_have_one_type():
    assert {ids.dtype for ids in (BPE.encode(""), ByteTokenizer().encode("x"))} == {
        np.dtype(np.int32)
    }
