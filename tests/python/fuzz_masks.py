"""Differential fuzzer of mask trees.

Draws random expressions of masks, shapes and types, and compares what the library makes of them
with NumPy's: the dense mask, tile classes, plans, and attention forward and backward on every
instruction set. Runs for as long as one likes:

    python tests/python/fuzz_masks.py --seconds 600

A failure prints its seed; `--seed N --count 1` runs that case again.
"""

from __future__ import annotations

import argparse
import sys
import time

import library_under_test  # isort: skip  (when run by hand)
import anymask as am
import mask_cases
import numpy as np
import reference
import torch
from anymask import machine

assert library_under_test.ROOT

DTYPES = {"float64": 1e-10, "float32": 2e-4, "bfloat16": 6e-2, "float16": 1e-2}
BATCH, MAX_LEAVES, MAX_LENGTH = 2, 6, 260


def run_case(seed: int) -> None:
    """One random case; raises AssertionError when something disagrees."""
    rng = np.random.default_rng(seed)
    b = int(rng.integers(1, BATCH + 1))
    kv_heads, group = int(rng.integers(1, 3)), int(rng.choice([1, 2, 3]))
    h = kv_heads * group
    m, n = (int(x) for x in rng.integers(0, rng.choice([4, 40, MAX_LENGTH]), 2))
    n = m if rng.random() < 0.4 else n
    mask, allowed = mask_cases.random_tree(rng, b, h, m, n, int(rng.integers(1, MAX_LEAVES + 1)))
    if m and n:
        np.testing.assert_array_equal(mask_cases.dense_of(mask, b, h, m, n), allowed)
        check_tiles(rng, mask, b, h, m, n)
    check_attention(rng, mask, allowed, (b, h, kv_heads, m, n))


def check_tiles(rng, mask, b, h, m, n):
    tile = tuple(int(x) for x in rng.choice([16, 32, 64, 128], 2))
    dense = mask.to_dense(b, h, m, n)
    classes = mask.tile_classes(b, h, m, n, tile=tile)
    for index in np.ndindex(*classes.shape):
        r, c = index[2] * tile[0], index[3] * tile[1]
        pairs = dense[index[0], index[1], r : r + tile[0], c : c + tile[1]]
        truth = 1 if pairs.all() else 2 if not pairs.any() else 3
        assert classes[index] in (truth, 3), f"tile {index}: {classes[index]}, not {truth}"


def check_attention(rng, mask, allowed, sizes):
    b, h, kv_heads, m, n = sizes
    dtype = str(rng.choice(list(DTYPES)))
    d, dv = (int(rng.choice([8, 24, 64, 80])) for _ in range(2))
    shapes = [(b, m, h, d), (b, n, kv_heads, d), (b, n, kv_heads, dv)]
    leaves = [
        torch.from_numpy(rng.standard_normal(shape)).to(getattr(torch, dtype)).requires_grad_()
        for shape in shapes
    ]
    arrays = [x.detach().double().numpy() for x in leaves]
    out, lse = reference.attention(*arrays, allowed)
    dout = torch.from_numpy(rng.standard_normal(out.shape)).to(leaves[0].dtype)
    gradients = reference.attention_backward(*arrays, allowed, dout.double().numpy())
    plan = None
    if rng.random() < 0.5:
        plan = am.plan(
            mask, batch=b, q_heads=h, kv_heads=kv_heads, q_len=m, kv_len=n, head_dim=d,
            v_head_dim=dv, dtype=leaves[0].dtype,
        )  # fmt: skip
    got_out, got_lse = am.attention(*leaves, None if plan else mask, plan=plan, return_lse=True)
    got = torch.autograd.grad(got_out, leaves, dout)
    tolerance = DTYPES[dtype]
    for name, x, y in (
        ("out", got_out, out),
        ("lse", got_lse, lse),
        *zip(("dq", "dk", "dv"), got, gradients),
    ):
        x = x.detach().double().numpy()
        scale = max(1.0, np.abs(y[np.isfinite(y)]).max(initial=0.0))
        np.testing.assert_allclose(
            x / scale, y / scale, rtol=0, atol=tolerance, err_msg=f"{name} {dtype} {mask!r}"
        )


def fuzz(seconds: float, seed: int = 0, count: int | None = None) -> int:
    """Runs cases until the time is over or `count` are done; returns their number."""
    end = time.monotonic() + seconds
    sets = machine.instruction_sets()
    before, done = machine.instruction_set(), 0
    try:
        while time.monotonic() < end and (count is None or done < count):
            machine.set_instruction_set(sets[(seed + done) % len(sets)])
            try:
                run_case(seed + done)
            except BaseException:
                print(f"\nfailed: seed {seed + done}, {machine.instruction_set()}", file=sys.stderr)
                raise
            done += 1
    finally:
        machine.set_instruction_set(before)
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, help="of the first case (default: the time)")
    parser.add_argument("--count", type=int, help="stop after so many cases")
    options = parser.parse_args()
    seed = int(time.time()) if options.seed is None else options.seed
    done = fuzz(options.seconds, seed, options.count)
    print(f"{done} cases agree (seeds {seed} to {seed + done - 1})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
