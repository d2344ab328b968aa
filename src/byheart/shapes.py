"""The one legend of dimension names.

Signatures use the long name (checked by jaxtyping in the tests); bodies in `byheart.ops` use the
letter as a suffix of the tensor's name, so that `scores_BHQK` says its shape. Axes of size 1 are
written `1`: `gate_H11`.

====== ============= ==========================================================================
letter name          meaning
====== ============= ==========================================================================
B      batch         rows of the batch; one row follows one document at a time
Q      query         tokens that ask
S      segment       tokens of one segment
W      window        previous tokens a query can see locally
N      entry         slots of a memory, used or not; or keys of an attention
K      top_k         neighbours retrieved per query
H      heads         attention heads
G      kv_heads      key-value heads (`heads` is a multiple of `kv_heads`)
D      head_dim      width of one head
E      embed_dim     width of the residual stream
F      hidden_dim    width inside the feed-forward block
V      vocab         entries of the vocabulary
====== ============= ==========================================================================
"""
