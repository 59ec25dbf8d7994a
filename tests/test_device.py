"""A step never waits for the device, and sends it nothing that it would have to wait for.

Where there is no GPU, the device is one in name alone: torch's fake tensors have shapes, types and places but no
values, so that whatever asks for a value fails. It is called "lazy": of torch 2.11's devices the only one
that goes backward without its hardware. What fake tensors do not see, as a copy that blocks, `Watch` does.
"""

import contextlib
import math
import time

import numpy as np
import pytest
import timm
import torch
from torch._subclasses.fake_tensor import (DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode,
                                           unset_fake_temporarily)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.transforms import v2
from torchvision.transforms.v2 import _augment

import cam
import data
import proxy
from engine import chance, costs, loader, policies, settings, training
from engine.dataset import Dataset, Pixels
from engine.decoy import draw_decoy

DEVICE, CLASSES, COUNT = torch.device("lazy", 0), 10, 6
CHECKED = ("_linalg_eigh", "_linalg_svd", "linalg_inv_ex", "linalg_qr")  # they ask the device whether all went well


class Watch(TorchDispatchMode):
    """Fails at what the host or the device would wait for, and at float64, which Apple's GPUs have not; counts."""

    def __init__(self):
        super().__init__()
        self.launches = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result, name = function(*args, **kwargs), function.__name__
        copies = name.startswith(("_to_copy", "copy_", "_foreach_copy"))
        given, there = ([leaf for leaf in tree_leaves(of) if isinstance(leaf, torch.Tensor)
                         and (copies or leaf.dim() or leaf.device.type != "cpu")] for of in ((args, kwargs), result))
        places = {t.device.type for t in [*given, *there]}
        if len(places) > 1:  # other operations take a number from the host, a tensor without dimensions, as it is
            free = copies and (kwargs.get("non_blocking") or args[2:] == (True,))
            assert free and there[0].device.type != "cpu", f"{name} between {places}, which blocks"
        if DEVICE.type in places:
            assert not any(t.dtype == torch.float64 for t in [*given, *there]), f"{name} in float64"
            assert not name.startswith(CHECKED), name
            self.launches += not (torch.Tag.inplace_view in function.tags or function.is_view)
        return result


def on(module):
    """The module with its tensors on the device, in place: `Module.to` does not take fake tensors there."""
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    layout = torch.channels_last if tensor.dim() == 4 else torch.preserve_format
                    there = tensor.detach().to(DEVICE, memory_format=layout)
                    table[name] = torch.nn.Parameter(there) if table is part._parameters else there
    module.to = lambda *arguments, **options: module
    return module


def real(function):
    """The function with tensors that have values: it draws on the host, and sees of what is fake only the shape."""
    def inner(*arguments, **options):
        with unset_fake_temporarily():
            return function(*arguments, **options)

    return inner


HOSTS = [(policies, "drawn"), (policies, "rectangles"), (timm, "create_model")]
HOSTS += [(kind, name) for kind in (v2.CutMix, v2.MixUp, v2.RandomErasing) for name in ("__init__", "make_params")]


@pytest.fixture
def fake(monkeypatch):
    """Within it, tensors are fake ones; a generator there cannot be is the host's."""
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **options: contextlib.nullcontext())
    for module in (proxy, data):
        monkeypatch.setattr(module, "torch_generator", lambda device, *key: chance.torch_generator("cpu", *key))
    for owner, name in HOSTS:
        monkeypatch.setattr(owner, name, real(getattr(owner, name)))
    monkeypatch.setattr(torch, "multinomial", lambda *arguments: 0)  # one of one transform
    monkeypatch.setattr(_augment, "one_hot", lambda labels, num_classes: labels.new_zeros(len(labels), num_classes)
                        .scatter(1, labels[:, None], 1))  # which asks any device but CUDA's for the largest
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def training_of(model="test_resnet", cam_name="gradcam", device=DEVICE, **changes):
    config = settings.resolve(settings.read_configs(), {"model": model, "cam": cam_name, "pretrained": False,
                                                        "amp": "off"}) | changes
    size = {"img_size": 64} if "vit" in model else {}
    nets = [timm.create_model(model, num_classes=CLASSES, **size) for _ in range(1 + (config["heat"] == "RUN"))]
    if device == DEVICE:
        nets = [on(net) for net in nets]
    grids = torch.rand(COUNT, 8, 8).half() if config["heat"] == "snapshot" else None
    t = training.Training(config, nets[0], device, CLASSES, 100, 3, *[net.eval() for net in nets[1:]], grids=grids)
    t.order = loader.Order(4 * COUNT, COUNT, 0)
    if device == DEVICE:
        t.optimizer.defaults["fused"], t.optimizer.step = True, lambda: None  # it would need the kernels themselves
    if t.proxy.explain is not None:
        for part in (t.proxy.explain, *t.proxy.explain._parts):
            part.checked = True  # asked once a run
    return t


def steps(t, batches, watch=Watch, count=2):
    """Some steps as the loop of `train.py` takes them; the first is not watched: the layer is chosen there."""
    counts = costs.Counts(t.device, costs.Energy(torch.device("cpu"), powercap="/none"))
    t.begin_epoch(counts)
    watch = watch()
    for step in range(count):
        with watch if step else contextlib.nullcontext():
            pixels, labels = batches(t.device)
            images, labels = t.prepare(pixels, labels, 0, step, count + 1)  # of --heat snapshot, looks its heat up
            trained = t.proxy.step(0, [])(t.forward, images, labels, t.proxy)
            updated, skipped = t.backward(trained.loss, step, count + 1)
            counts.add(trained, updated, skipped)
    assert isinstance(watch, Watch) or math.isfinite(counts.totals()["train_loss"])
    return watch


def drawn(device=DEVICE):
    """Pixels and labels on the device."""
    return (torch.randint(256, (COUNT, 3, 64, 64), dtype=torch.uint8, device=device),
            torch.randint(CLASSES, (COUNT,), device=device))


def cycled(**names):
    """As many settings as the longest of these tables has names, each name of every table at least once."""
    tables = [[*table] for table in names.values()]
    return [dict(zip(names, (table[i % len(table)] for table in tables))) for i in range(max(map(len, tables)))]


CASES = cycled(fill=proxy.FILLS, select=proxy.SELECTIONS, explain=cam.EXPLAIN, control=(None, *proxy.CONTROLS)[::-1],
               augment=[*data.AUGMENTATIONS, *(f"none,{name}" for name in data.ON_TOP)])
CASES += [{**step, "budget": budget, "fill": fill, "augment": augment}
          for step in ({"step": "online"}, {"step": "same_step"}, {"heat": "RUN"})
          for budget, fill, augment in (("equal", "swap", "cutmix"), ("extra", "transplant", "mixup"))]
CASES += [{"heat": "snapshot", "fill": fill, "augment": augment, "budget": budget} for augment, fill, budget in zip(
    data.MOVES, ("transplant", "swap", "noise", "transplant"), ("equal", "extra") * 2)]
CASES += [{"cam_name": method} for method in ("none", *cam.METHODS) if method not in (*cam.ATTENTION, "gradcam", "cam")]
CASES += [{"cam_name": "cam", "layer": "-1"}, {"budget": "extra"}]
CASES += [{"model": "test_vit", "cam_name": method} for method in ("gradcam", "eigencam", *cam.ATTENTION)]
SLOW = ("xgradcam", "hirescam", "layercam", "elementwise", "center", "rollout")
CASES = [pytest.param(case, marks=[pytest.mark.slow] * (case.get("cam_name") in SLOW)) for case in CASES]


@pytest.mark.parametrize("changes", CASES, ids=lambda changes: " ".join(map(str, changes.values())))
def test_a_step_asks_the_device_for_no_value_and_waits_for_no_copy(changes, fake):
    assert steps(training_of(**changes), drawn).launches > 100


@pytest.mark.parametrize("resident", [True, False], ids=["on the device", "from memory"])
def test_batches_with_a_decoy_reach_the_device_without_a_copy_that_blocks(resident, fake, monkeypatch):
    pixels = np.zeros((24, 64, 64, 3), np.uint8)
    names = [str(i) for i in range(24)]
    dataset = Dataset("zeros", None, list("ab"), names, np.arange(24) % 2, pixels, pixels=Pixels(pixels))
    dataset.decoy = draw_decoy(dataset, {"test": []}, 1, 0)
    monkeypatch.setattr(loader, "RESIDENT_BYTES", 2**30 if resident else 0)
    made = loader.Batches(dataset, names, 64, COUNT, DEVICE, seed=0)
    if not resident:
        made.labels = real(torch.zeros)(24, dtype=torch.int64)  # a thread reads them, and fake tensors know only one
    batches = iter(made)
    assert steps(training_of(), lambda device: next(batches)).launches > 100


WAITS = {"item": lambda images, labels: images.amax().item(), "if": lambda images, labels: bool(labels[0]),
         "index": lambda images, labels: images[labels > 0], "list": lambda images, labels: images[[0, 1]],
         "host's index": lambda images, labels: images[torch.tensor([0, 1])],
         "copy": lambda images, labels: torch.zeros(3).to(DEVICE),
         "copy_": lambda images, labels: labels.copy_(torch.ones(COUNT)),
         "number": lambda images, labels: torch.tensor(1.0, device=DEVICE),
         "back": lambda images, labels: labels.to("cpu", non_blocking=True),
         "eigenvalues": lambda images, labels: torch.linalg.eigh(torch.eye(3, device=DEVICE)),
         "float64": lambda images, labels: labels.double()}


@pytest.mark.parametrize("what", WAITS)
def test_what_waits_for_the_device_is_found(what, fake):
    with pytest.raises((AssertionError, DataDependentOutputException, DynamicOutputShapeException)):
        with Watch():
            WAITS[what](*drawn())


def test_what_waits_within_a_step_is_found(fake, monkeypatch):
    t, fill = training_of(), proxy.FILLS["black"]
    monkeypatch.setitem(proxy.FILLS, "black", lambda images, mask, scene: fill(images, mask & bool(mask.any()), scene))
    with pytest.raises(DataDependentOutputException):
        steps(t, drawn)


# --- what only a GPU shows

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Strict:
    """Within it torch itself raises where the host waits for the GPU."""

    def __enter__(self):
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *exception):
        torch.cuda.set_sync_debug_mode("default")


@GPU
@pytest.mark.parametrize("changes", CASES, ids=lambda changes: " ".join(map(str, changes.values())))
def test_on_a_gpu_no_step_waits(changes):
    steps(training_of(device=torch.device("cuda", 0), **changes), drawn, Strict, count=4)


@GPU
@pytest.mark.parametrize("decoy", [False, True])
def test_on_a_gpu_batches_from_pinned_memory_are_those_of_the_cpu_however_busy_it_is(decoy, monkeypatch):
    monkeypatch.setattr(loader, "RESIDENT_BYTES", 0)
    pixels = np.random.default_rng(0).integers(0, 256, (512, 64, 64, 3), dtype=np.uint8)
    names, work = [str(i) for i in range(512)], torch.randn(4096, 4096, device="cuda")
    dataset = Dataset("random", None, list("ab"), names, np.arange(512) % 2, pixels, pixels=Pixels(pixels))
    dataset.decoy = draw_decoy(dataset, {"test": []}, 1, 0) if decoy else None
    kept = []
    for images, labels in loader.Batches(dataset, names, 64, 32, torch.device("cuda", 0), seed=0):
        for _ in range(20):
            work = (work @ work).clamp_(-1, 1)  # the host runs ahead of it, and memory would be used again
        kept.append((images.clone(), labels.clone()))
    for found, expected in zip(kept, loader.Batches(dataset, names, 64, 32, torch.device("cpu"), seed=0), strict=True):
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected))


@GPU
@pytest.mark.parametrize("index", [0, pytest.param(1, marks=pytest.mark.skipif(torch.cuda.device_count() < 2,
                                                                              reason="needs two GPUs"))])
def test_on_a_gpu_the_heats_seconds_are_those_of_the_device_that_computes_it(index):
    device = torch.device("cuda", index)
    counts = costs.Counts(device, costs.Energy(torch.device("cpu"), powercap="/none"))
    work = torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    with counts.timing_cam():
        for _ in range(20):
            work = (work @ work).clamp_(-1, 1)
    torch.cuda.synchronize(device)
    taken = time.perf_counter() - start
    assert 0.5 * taken < counts.so_far()["cam_seconds"] <= taken
    assert counts.lately()["images_seen"] == counts.totals()["images_seen"] == 0


@GPU
@pytest.mark.parametrize("name", ["RandAugment", "TrivialAugmentWide"])
def test_on_a_gpu_images_are_augmented_as_on_the_cpu_but_for_rounding(name):
    pixels = torch.randint(256, (64, 3, 96, 96), dtype=torch.uint8)
    operations = policies.drawn(getattr(v2, name)(), 64, 0, 96, "x")
    found = policies.changed(pixels.to("cuda"), operations).cpu().int()
    assert ((found - policies.changed(pixels, operations).int()).abs() > 1).float().mean() < 0.01  # ties of "nearest"
