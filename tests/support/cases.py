"""The one table of attention cases: shapes and options as data. Tests and benchmarks draw their inputs from it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One call of prefix_attention (or, with seqlens, prefix_attention_varlen). Defaults: a small causal batch."""

    name: str
    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    q_len: int = 9
    kv_len: int = 9
    head_dim: int = 32
    value_dim: int | None = None  # None: head_dim
    prefix_len: int = 5
    prefixes: int | None = None  # None: one shared prefix; else a bank
    prefix_ids: tuple[int, ...] | None = None
    prefix_lens: tuple[int, ...] | None = None
    causal: bool = True
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    first_key_position: int | None = None
    key_lens: tuple[int, ...] | None = None
    padding: str | None = None  # "left", "right", "holes", "row" (all keys of row 0 hidden), "all"
    bias: tuple[int, int, int, int] | None = None  # 1 broadcasts an axis, 0 stands for its full size
    bias_hides: bool = False  # some −inf in the bias
    contiguous: bool = False  # False: q, k, v as models give them, [batch, len, heads, dim] transposed
    seqlens_q: tuple[int, ...] | None = None  # varlen
    seqlens_k: tuple[int, ...] | None = None  # None: seqlens_q
    parent: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return self.name


CASES = (
    Case("plain"),
    Case("mha", kv_heads=4),
    Case("mqa", kv_heads=1),
    Case("contiguous", contiguous=True),
    Case("head_dim 80", head_dim=80),
    Case("head_dim 96", head_dim=96),
    Case("head_dim 128", head_dim=128),
    Case("head_dim 256", head_dim=256, heads=2, kv_heads=1),
    Case("value_dim below head_dim", head_dim=48, value_dim=32),
    Case("value_dim above head_dim", head_dim=32, value_dim=48),
    Case("no prefix", prefix_len=0),
    Case("prefix of one", prefix_len=1),
    Case("long prefix", prefix_len=150, q_len=70, kv_len=70),
    Case("long sequence", prefix_len=16, q_len=200, kv_len=200, heads=2, kv_heads=1),
    Case("one query", q_len=1, kv_len=1),
    Case("decode", q_len=1, kv_len=20),
    Case("decode mqa", q_len=1, kv_len=20, kv_heads=1),
    Case("chunked prefill", q_len=4, kv_len=20),
    Case("chunked prefill, padded", q_len=4, kv_len=20, padding="left"),
    Case("empty batch", batch=0),
    Case("batch of one", batch=1),
    Case("no keys", causal=False, kv_len=0, q_len=3),
    Case("no keys, no prefix", causal=False, kv_len=0, q_len=3, prefix_len=0),
    Case("no queries", q_len=0),
    Case("left padding", padding="left"),
    Case("right padding", padding="right"),
    Case("holes", padding="holes"),
    Case("hidden row", padding="row"),
    Case("hidden row, no prefix", padding="row", prefix_len=0),
    Case("everything hidden", padding="all", prefix_len=0),
    Case("not causal", causal=False),
    Case("not causal, longer queries", causal=False, q_len=12, kv_len=7),
    Case("cross attention, padded", causal=False, q_len=5, kv_len=11, padding="right"),
    Case("scale", scale=0.3),
    Case("scale zero", scale=0.0),
    Case("negative scale", scale=-0.3),
    Case("window", window=3),
    Case("window of one", window=1),
    Case("window wider than the keys", window=100),
    Case("window, not causal", window=3, causal=False),
    Case("window, decode", window=4, q_len=1, kv_len=20),
    Case("window, padded", window=4, padding="left"),
    Case("sliding prefix", window=6, first_key_position=0),
    Case("sliding prefix, later keys", window=8, first_key_position=2),
    Case("sliding prefix, decode", window=8, first_key_position=0, q_len=1, kv_len=6),
    Case("sliding prefix, not causal", window=6, first_key_position=0, causal=False),
    Case("sliding prefix, fill", window=6, first_key_position=1, key_lens=(4, 9), q_len=2, kv_len=9),
    Case("sliding prefix, bank", window=6, first_key_position=0, prefixes=2, prefix_ids=(1, 0), prefix_lens=(2, 5)),
    Case("first key position without window", first_key_position=3),
    Case("softcap", softcap=2.0),
    Case("softcap, window, padded", softcap=5.0, window=4, padding="left"),
    Case("fill", key_lens=(9, 9), q_len=3, kv_len=12),
    Case("fill, ragged", key_lens=(5, 12), q_len=3, kv_len=12),
    Case("fill, decode", key_lens=(1, 12), q_len=1, kv_len=12),
    Case("fill below the queries", key_lens=(2, 2), q_len=4, kv_len=12),
    Case("fill below the queries, ragged", key_lens=(2, 7), q_len=4, kv_len=12),
    Case("fill of zero", key_lens=(0, 3), q_len=2, kv_len=6),
    Case("fill of zero everywhere", key_lens=(0, 0), q_len=2, kv_len=6),
    Case("fill, padded", key_lens=(8, 12), q_len=3, kv_len=12, padding="left"),
    Case("fill, not causal", key_lens=(4, 12), q_len=5, kv_len=12, causal=False),
    Case("fill, window", key_lens=(7, 12), q_len=2, kv_len=12, window=3),
    Case("bias", bias=(0, 0, 0, 0)),
    Case("bias of heads", bias=(1, 0, 1, 0)),
    Case("bias of columns", bias=(1, 1, 1, 0)),
    Case("bias of queries", bias=(0, 1, 0, 1)),
    Case("bias that hides", bias=(0, 1, 0, 0), bias_hides=True),
    Case("bias, decode", bias=(1, 0, 0, 0), q_len=1, kv_len=12),
    Case("bias, chunked, padded", bias=(1, 0, 0, 0), q_len=4, kv_len=12, padding="left"),
    Case("bias, not causal, softcap", bias=(1, 0, 0, 0), causal=False, softcap=3.0),
    Case("bias, bank", bias=(0, 0, 0, 0), prefixes=3, prefix_ids=(2, -1), prefix_lens=(5, 1, 3)),
    Case("bank", prefixes=3, batch=4, prefix_ids=(2, 0, 2, 1)),
    Case("bank, one for all", prefixes=3, batch=3, prefix_ids=(1, 1, 1)),
    Case("bank, none for some", prefixes=2, batch=4, prefix_ids=(-1, 0, 1, -1)),
    Case("bank, none for all", prefixes=2, prefix_ids=(-1, -1)),
    Case("bank, lengths", prefixes=3, batch=4, prefix_ids=(2, 0, 1, -1), prefix_lens=(5, 0, 3)),
    Case("bank, padded, decode", prefixes=2, q_len=1, kv_len=9, prefix_ids=(1, 0), prefix_lens=(3, 5), padding="left"),
    Case("varlen", seqlens_q=(5, 1, 9)),
    Case("varlen, mha", seqlens_q=(5, 1, 9), kv_heads=4),
    Case("varlen, empty sequence", seqlens_q=(5, 0, 4)),
    Case("varlen, no sequence", seqlens_q=()),
    Case("varlen, no prefix", seqlens_q=(5, 1, 9), prefix_len=0),
    Case("varlen, longer keys", seqlens_q=(2, 1, 4), seqlens_k=(6, 1, 9)),
    Case("varlen, not causal", seqlens_q=(6, 1, 4), seqlens_k=(3, 2, 9), causal=False),
    Case("varlen, no keys", seqlens_q=(3, 2), seqlens_k=(0, 4), causal=False),
    Case("varlen, window", seqlens_q=(6, 3, 9), window=3),
    Case("varlen, softcap", seqlens_q=(6, 3), softcap=2.0),
    Case("varlen, bank", seqlens_q=(5, 3, 4, 2), prefixes=3, prefix_ids=(1, -1, 0, 1), prefix_lens=(2, 5, 5)),
    Case("varlen, value_dim", seqlens_q=(5, 3), head_dim=32, value_dim=16),
    Case("parent", seqlens_q=(6, 3, 4, 5, 2), parent=(-1, 0, 0, -1, 3)),
    Case("parent, bank", seqlens_q=(6, 3, 4, 5, 2), parent=(-1, 0, 0, -1, 3), prefixes=2, prefix_ids=(1, 1, 1, 0, 0)),
    Case("parent, empty", seqlens_q=(0, 3, 4), parent=(-1, 0, 0)),
    Case("parent, not causal", seqlens_q=(6, 3), parent=(-1, 0), causal=False),
    Case("parent, softcap", seqlens_q=(6, 3, 2), parent=(-1, 0, 0), softcap=3.0),
)  # fmt: skip

# Several blocks in every direction, for kernels whose blocks are made small: 16 queries, 16 keys.
_ROWS = {"heads": 2, "kv_heads": 1, "head_dim": 16}
_SMALL = _ROWS | {"batch": 1}
CASES_OF_SEVERAL_BLOCKS = (
    Case("blocks", **_ROWS, q_len=40, kv_len=40, prefix_len=37),
    Case("blocks, whole ones", **_SMALL, q_len=48, kv_len=48, prefix_len=32),
    Case("blocks, chunk", **_SMALL, q_len=35, kv_len=70, prefix_len=20),
    Case("blocks, four rows", **_ROWS, batch=4, q_len=25, kv_len=25, prefix_len=18),
    Case("blocks, not causal", **_SMALL, q_len=33, kv_len=50, prefix_len=20, causal=False),
    Case("blocks, window", **_SMALL, q_len=55, kv_len=55, prefix_len=20, window=21),
    Case("blocks, narrow window", **_SMALL, q_len=50, kv_len=60, prefix_len=3, window=5),
    Case("blocks, window of whole blocks", **_SMALL, q_len=64, kv_len=64, prefix_len=3, window=32),
    Case("blocks, window, not causal", **_SMALL, q_len=50, kv_len=60, prefix_len=20, window=19, causal=False),
    Case("blocks, sliding prefix", **_SMALL, q_len=40, kv_len=50, prefix_len=40, window=35, first_key_position=0),
    Case("blocks, sliding prefix, later", **_SMALL, q_len=40, kv_len=40, prefix_len=70, window=60, first_key_position=7),
    Case("blocks, sliding prefix, not causal", **_SMALL, q_len=60, kv_len=20, prefix_len=50, window=33, first_key_position=1,
         causal=False),
    Case("blocks, holes", **_SMALL, q_len=40, kv_len=60, prefix_len=20, padding="holes"),
    Case("blocks, left padding, window", **_SMALL, q_len=40, kv_len=40, prefix_len=20, padding="left", window=18),
    Case("blocks, fill", **_ROWS, batch=4, q_len=35, kv_len=66, prefix_len=20, key_lens=(66, 48, 20, 0)),
    Case("blocks, fill, window", **_ROWS, batch=3, q_len=35, kv_len=66, prefix_len=20, key_lens=(60, 30, 0), window=17),
    Case("blocks, fill, not causal", **_ROWS, batch=3, q_len=20, kv_len=66, key_lens=(50, 16, 0), causal=False),
    Case("blocks, fill, sliding prefix", **_ROWS, batch=3, q_len=20, kv_len=40, prefix_len=40, key_lens=(40, 9, 30), window=30,
         first_key_position=2),
    Case("blocks, bank", **_ROWS, batch=5, q_len=20, kv_len=20, prefix_len=37, prefixes=3, prefix_ids=(2, -1, 0, 2, 1),
         prefix_lens=(33, 0, 17)),
    Case("blocks, softcap", batch=1, heads=4, kv_heads=2, head_dim=16, q_len=20, kv_len=40, prefix_len=20, softcap=2.0),
    Case("blocks, bias", **_ROWS, q_len=40, kv_len=40, prefix_len=37, bias=(0, 0, 0, 0)),
    Case("blocks, bias of heads", heads=4, kv_heads=2, head_dim=16, q_len=35, kv_len=70, prefix_len=20, bias=(1, 0, 1, 0)),
    Case("blocks, bias of queries", **_ROWS, q_len=35, kv_len=50, prefix_len=20, causal=False, bias=(0, 1, 0, 1)),
    Case("blocks, bias that hides", **_ROWS, batch=3, q_len=40, kv_len=40, prefix_len=20, padding="left", bias=(0, 1, 0, 0),
         bias_hides=True),
    Case("blocks, bias, not causal, holes", **_ROWS, q_len=33, kv_len=50, prefix_len=20, causal=False, padding="holes",
         bias=(1, 0, 0, 0)),
    Case("blocks, bias, bank", **_ROWS, batch=5, q_len=20, kv_len=20, prefix_len=37, prefixes=3, prefix_ids=(2, -1, 0, 2, 1),
         prefix_lens=(33, 0, 17), bias=(0, 0, 0, 0)),
    Case("blocks, bias, sliding prefix, softcap", batch=1, heads=4, kv_heads=2, head_dim=16, q_len=40, kv_len=50, prefix_len=40,
         window=35, first_key_position=0, softcap=2.0, bias=(1, 0, 0, 0)),
    Case("blocks, bias, fill, window", **_ROWS, batch=3, q_len=35, kv_len=66, prefix_len=20, key_lens=(60, 30, 0), window=17,
         bias=(0, 0, 0, 0), bias_hides=True),
    Case("blocks, value_dim", batch=1, heads=2, kv_heads=1, head_dim=24, value_dim=40, q_len=40, kv_len=40, prefix_len=20),
    Case("blocks, packed", **_SMALL, seqlens_q=(40, 1, 25, 0, 18), prefix_len=20),
    Case("blocks, packed, longer keys", **_SMALL, seqlens_q=(20, 1, 35), seqlens_k=(50, 33, 35), prefix_len=20),
    Case("blocks, packed, window", **_SMALL, seqlens_q=(60, 1, 35), prefix_len=20, window=18),
    Case("blocks, packed, not causal", **_SMALL, seqlens_q=(40, 3), seqlens_k=(18, 50), prefix_len=20, causal=False),
    Case("blocks, parent", **_SMALL, seqlens_q=(40, 20, 0, 18, 33, 35), parent=(-1, 0, 0, 0, -1, 4), prefix_len=20),
    Case("blocks, parent, bank", **_SMALL, seqlens_q=(20, 17, 33, 5), parent=(-1, 0, -1, 2), prefix_len=20, prefixes=2,
         prefix_ids=(1, 1, 0, 0), prefix_lens=(20, 18)),
    Case("blocks, parent, not causal", **_SMALL, seqlens_q=(35, 20), parent=(-1, 0), causal=False, prefix_len=3),
)  # fmt: skip
