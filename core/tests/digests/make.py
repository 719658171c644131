"""Writes encoders.txt, which `cargo test` holds this crate's encoders to.

    pip install ml_dtypes numpy
    python3 make.py > encoders.txt

Every one of the 2^32 f32 bit patterns, in order, is encoded to a byte. Block b is the 2^24 patterns whose
upper byte is b. A line says: encoder, first block, last block (hexadecimal), SHA-256 of the block's bytes,
which is the same for all blocks of the line.

The committed file is of ml_dtypes 0.6.0 and numpy 2.4.6.

ml_dtypes is the judge of rounding. It does not saturate, so inputs are clamped to the format's range first.
What it has no answer for, or another one than PTX's `cvt`, is written out below.
"""

import hashlib
import sys

import ml_dtypes
import numpy as np


def cast(x, dtype):
    return x.astype(dtype).view(np.uint8)


def e4m3(x):
    codes = cast(np.clip(x, -448, 448), ml_dtypes.float8_e4m3fn)
    codes[np.isnan(x)] = 0x7F  # PTX drops a NaN's sign, ml_dtypes keeps it
    return codes


def ue4m3(x):
    codes = cast(np.clip(x, 0, 448), ml_dtypes.float8_e4m3fn)
    codes[np.signbit(x)] = 0  # no negative numbers; np.clip may let -0.0 pass
    codes[np.isnan(x)] = 0x7F
    return codes


def e2m1(x):
    codes = cast(np.clip(x, -6, 6), ml_dtypes.float4_e2m1fn)
    codes[np.isnan(x)] = 0x7  # no NaN in the format: PTX makes it the largest number
    return codes


# UE8M0 has no sign, and CUDA converts the magnitude; ml_dtypes would make zero and the negative NaN.
def magnitude(x):
    return np.clip(np.abs(x), np.float32(2.0**-127), np.float32(2.0**127))


def ue8m0(x):
    m = magnitude(x)
    codes = cast(m, ml_dtypes.float8_e8m0fnu)
    # ml_dtypes rounds f32 subnormals up from just above 2^-127. Times 2^64 they are normal, and 64 codes up.
    small = m < np.float32(2.0**-126)
    codes[small] = cast(m[small] * np.float32(2.0**64), ml_dtypes.float8_e8m0fnu) - 64
    codes[np.isnan(x)] = 0xFF
    return codes


def ue8m0_up(x):
    # ml_dtypes rounds to nearest only. m = fraction * 2^exponent with 0.5 <= fraction < 1, exactly.
    fraction, exponent = np.frexp(magnitude(x))
    power = np.where(fraction == 0.5, exponent - 1, exponent)
    codes = np.where(np.isnan(x), 255, power + 127).astype(np.uint8)
    return codes


def main():
    for encoder in (e4m3, ue4m3, e2m1, ue8m0, ue8m0_up):
        runs = []  # [first block, last block, digest]
        for block in range(256):
            bits = np.arange(block << 24, (block + 1) << 24, dtype=np.uint32)
            with np.errstate(invalid="ignore"):
                codes = encoder(bits.view(np.float32))
            digest = hashlib.sha256(codes).hexdigest()
            if runs and runs[-1][2] == digest:
                runs[-1][1] = block
            else:
                runs.append([block, block, digest])
        for first, last, digest in runs:
            print(f"{encoder.__name__} {first:02x} {last:02x} {digest}")
        print(f"{encoder.__name__}: done", file=sys.stderr)


main()
