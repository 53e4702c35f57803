"""The pool of sharers: each adapter is read once by a pool, and anew by the next."""

from pathlib import Path

import torch

from prime.checkpoints.peft import save_adapter
from prime.merging.sharers import Pool
from tests import tiny


def test_a_new_pool_reads_what_is_there_now(tmp_path: Path) -> None:
    """A notebook that trains anchors again must not merge the old ones."""
    base = tiny.model()
    firsts = []
    for seed in (1, 2):
        own = tiny.adapter(base, seed)
        save_adapter(own, tmp_path, "base")
        pool = Pool((), (tmp_path,), ((0,), (0,)), "base")
        (read,), (again,) = pool.adapters(0), pool.adapters(1)
        assert again is read and read.factors.keys() == own.factors.keys()
        assert all(torch.equal(read.factors[name][0], a) for name, (a, _) in own.factors.items())
        firsts.append(next(iter(read.factors.values()))[0])
    assert not torch.equal(*firsts)
