"""Random numbers that follow from a key alone, as (seed, epoch, step): so an interrupted run can go on at any step."""

import hashlib

import numpy as np
import torch


def stable_seed(*key):
    """63-bit seed from any key of strings and integers, the same on every machine and in every process."""
    text = "\0".join(map(str, key)).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def numpy_generator(*key):
    return np.random.default_rng(stable_seed(*key))


def torch_generator(device, *key):
    return torch.Generator(device).manual_seed(stable_seed(*key))


def shuffled(ids, *key):
    """The ids in an order that follows from `key`."""
    return [ids[i] for i in numpy_generator("shuffle", *key).permutation(len(ids))]
