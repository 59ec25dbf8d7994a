"""Several processes that train one network, and the signals that end a run.

    torchrun --nproc-per-node 4 train.py --dataset places --model resnet50

torchrun starts the processes and gives each its rank; `start` joins them (NCCL on GPUs, gloo on CPUs). Each rank takes
its part of every batch, `DistributedDataParallel` averages the gradients, and rank 0 alone writes. Without torchrun
there is one process, rank 0 of 1, and every function here returns at once.
"""

import contextlib
import datetime
import json
import os
import signal
import time

import torch
import torch.distributed as dist

from engine.files import UserError

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
HERE = int(os.environ.get("LOCAL_WORLD_SIZE", RANKS))  # processes on this machine
LAUNCHER = "python" if RANKS == 1 else "torchrun " + f"--nnodes {RANKS // HERE} … " * (RANKS > HERE) + \
    f"--nproc-per-node {HERE}"  # what a user types before train.py to go on
TIMEOUT = datetime.timedelta(minutes=30)  # of one exchange between processes that all take part in it
PAUSE = 0.1  # seconds from asking for another rank's answer to asking again; it may decode a dataset meanwhile
LEAVE_SECONDS = 10  # that rank 0 waits at its end for the others, at most
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
_store, _answers = None, 0


def start(device):
    """Join the other processes, if there are any. device: the setting; `auto` gives each a GPU. Returns the setting."""
    if RANKS == 1:
        return device
    if device.startswith("cuda:"):
        raise UserError(f"--device {device}: torchrun gives each process a GPU of its own; give --device cuda")
    if device == "cuda" or device == "auto" and torch.cuda.is_available():
        if LOCAL_RANK >= torch.cuda.device_count():
            raise UserError(f"torchrun --nproc-per-node: more processes than the {torch.cuda.device_count()} GPUs here")
        device = f"cuda:{LOCAL_RANK}"
        torch.cuda.set_device(device)  # before NCCL asks for it
    if not dist.is_initialized():
        global _store
        # What torchrun restarts would find the addresses of those that died in the same store under the same name.
        store, rank, ranks = next(dist.rendezvous("env://", timeout=TIMEOUT))
        store = _store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=TIMEOUT)
    return device


def end():
    """Leave together: rank 0 holds the store that the others ask, and waits until they have their last answer."""
    if RANKS > 1 and dist.is_initialized():
        until = time.monotonic() + LEAVE_SECONDS
        with contextlib.suppress(RuntimeError):  # where another has crashed
            _store.set(f"end of {RANK}", "")
            while RANK == 0 and time.monotonic() < until and not _store.check([f"end of {r}" for r in range(RANKS)]):
                time.sleep(PAUSE)
        dist.destroy_process_group()


def everyone(value):
    """The values of all ranks, in their order, on every rank. They are pickled: small ones, and not within a step."""
    if RANKS == 1:
        return [value]
    values = [None] * RANKS
    dist.all_gather_object(values, value)
    return values


def to_first(tensor):
    """On rank 0 a list of the tensors of all ranks, on the CPU; None on the others, who receive none of them."""
    own = tensor.cpu().contiguous()
    about = everyone((list(own.shape), str(own.dtype).removeprefix("torch.")))
    if RANK:
        dist.send(own.flatten().view(torch.uint8), 0)  # as bytes, for gloo does not send every dtype
        return None
    found = [own]
    for rank, (shape, dtype) in enumerate(about[1:], 1):
        found.append(torch.empty(shape, dtype=getattr(torch, dtype)))
        dist.recv(found[-1].flatten().view(torch.uint8), rank)
    return found


def from_first(function, *arguments):
    """What rank 0 gets from the function, plain as in JSON, or its UserError, on every rank; the others wait."""
    return from_each([0], function, *arguments)[0]


def machines():
    """The first rank of each machine, for `from_each`."""
    return range(0, RANKS, HERE)


def from_each(which, function, *arguments):
    """What the ranks `which` get from the function, as a list, or the first UserError of theirs, on every rank.

    All wait for these, however long they take. What they get is plain, as in JSON.
    """
    if RANKS == 1:
        return [function(*arguments)]
    global _answers
    _answers += 1
    keys = [f"answer {_answers} of {rank}" for rank in which]
    if RANK in which:
        try:
            answer = [function(*arguments), None]
        except UserError as error:
            answer = [None, [str(error), error.resumable]]
        _store.set(f"answer {_answers} of {RANK}", json.dumps(answer))
    while not _store.check(keys):
        time.sleep(PAUSE)
    answers = [json.loads(_store.get(key)) for key in keys]
    for _, error in answers:
        if error is not None:
            raise UserError(*error)
    return [value for value, _ in answers]


def first_to_say(text):
    """Whether this process is the first that reports an error: one of all may be found by all, or by any of them."""
    if _store is None:
        return RANK == 0
    try:
        return _store.add(f"said {text}", 1) == 1
    except RuntimeError:  # the process that kept the store has ended
        return True


def wrap(model, device):
    """The model as the ranks train it together, with gradients averaged."""
    if RANKS == 1:
        return model
    return torch.nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def average(model, now):
    """Whether the next backward pass averages the gradients. DDP arms for it in the forward pass: call this before."""
    if RANKS > 1:
        model.require_backward_grad_sync = now  # what `no_sync` sets, around a block


def share_buffers(model):
    """Give every rank the batch statistics of rank 0, which are saved: DDP does so only before a step."""
    if RANKS > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


class Stopped(KeyboardInterrupt):
    """A signal ended the run; `signal` is its number. No Exception, for which a broken image would be blamed."""

    def __init__(self, number):
        super().__init__(number)
        self.signal = number


class Stop:
    """Ends a run when a signal asks for it: between two steps, or at once outside of steps and at a second signal.

    The ranks get the signal at different moments and must stop after the same step: in each step they send what they
    have and read what came the step before, so that nobody waits for the answer.
    """

    def __init__(self):
        self.signal, self.within_steps, self._sent = 0, False, None
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def _receive(self, number, frame):
        if self.signal or not self.within_steps:
            raise Stopped(number)
        self.signal = number

    def asked(self, due=False):
        """(signal that ends the run after this step or 0, whether to write a checkpoint): the same on every rank.

        due: whether this process finds that it is time for one; of several, rank 0's clock counts.
        """
        if RANKS == 1:
            return self.signal, due
        flags = torch.tensor([self.signal, due and RANK == 0])
        before, self._sent = self._sent, (dist.all_reduce(flags, dist.ReduceOp.MAX, async_op=True), flags)
        if before is None:
            return 0, False
        before[0].wait()
        return int(before[1][0]), bool(before[1][1])

    def leave_steps(self):
        """From here on a signal ends the run at once; one that came too late for a step does so now."""
        self.within_steps, self._sent = False, None
        if self.signal:
            raise Stopped(self.signal)

    def end(self):
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
