"""cam.py and engine/hooks.py: which layer is explained, and what the hooks promise to a training loop."""

import gc
import os
import weakref

import pytest
import torch
import torch.nn.functional as F
from test_cam import SMALLER, network, photographs

import cam
from cam import CAM, upsample
from engine.files import UserError
from engine.network import try_network

# --- which layer


@pytest.mark.parametrize("name, size, layer, grid", [
    ("resnet18", 224, "layer4", 7), ("resnet18", 64, "layer3", 4), ("resnet18", 32, "layer2", 4),
    ("resnet50", 224, "layer4", 7), ("efficientnet_b0", 224, "bn2", 7), ("tf_efficientnet_lite0", 128, "bn2", 4),
    ("vgg16", 224, "features.30", 7), ("convnext_tiny", 224, "stages.3", 7), ("convnext_tiny", 64, "stages.2", 4),
    ("swin_tiny_patch4_window7_224", 224, "norm", 7), ("vit_tiny_patch16_224", 224, "blocks.11.norm1", 14),
    ("test_vit", 160, "blocks.5.norm1", 10), ("densenet121", 224, "features.norm5", 7),
    ("resnext50_32x4d", 224, "layer4", 7), ("mobilenetv3_large_100", 224, "blocks.6", 7),
    ("regnety_002", 224, "s4", 7), ("deit_tiny_distilled_patch16_224", 224, "blocks.11.norm1", 14),
    ("deit3_small_patch16_224", 224, "blocks.11.norm1", 14), ("vit_base_patch16_siglip_224", 224, "norm", 14),
    ("vit_small_patch14_reg4_dinov2", 518, "blocks.11.norm1", 37), ("swinv2_tiny_window8_256", 256, "norm", 8),
    ("mixer_s32_224", 224, "norm", 7), ("maxvit_nano_rw_256", 256, "norm", 8), ("coatnet_nano_rw_224", 224, "norm", 7),
    ("mobilevit_s", 256, "final_conv", 8), ("cait_xxs24_224", 224, "blocks.23.norm1", 14)])
def test_the_rule_explains_the_deepest_layer_with_a_4x4_grid(name, size, layer, grid):
    model = network(name).train()
    config = {"model": name, "cam": "gradcam", "layer": None, "image_size": size}
    assert try_network(config, model) == (layer, (grid, grid))
    assert model.training


@pytest.mark.parametrize("name, size, layer, grid", [
    ("resnet18", 224, "layer3", 14), ("resnet18", 32, "layer3", 2), ("tf_efficientnet_lite0", 128, "blocks.4", 8),
    ("vit_tiny_patch16_224", 224, "blocks.10.norm1", 14), ("swin_tiny_patch4_window7_224", 224, "layers.2", 14)])
def test_a_layer_can_be_counted_from_the_end(name, size, layer, grid):
    model, config = network(name), {"model": name, "cam": "layercam", "layer": "-2", "image_size": size}
    assert try_network(config, model) == (layer, (grid, grid))
    with pytest.raises(UserError, match="has no layer -99: it has .* stages, "):
        try_network(config | {"layer": "-99"}, model)
    with pytest.raises(UserError, match="no layer '-0'"):
        try_network(config | {"layer": "-0"}, model)


def test_what_does_not_fit_is_an_error_that_names_what_would():
    with pytest.raises(ValueError, match="no layer keeps a 4x4 grid.*use larger images, or name a layer"):
        model = network("test_resnet")
        with CAM(model):
            model(torch.randn(2, 3, 6, 6))
    with pytest.raises(ValueError, match="cam needs a linear head on the global average.*use gradcam"):
        model = network("vit_tiny_patch16_224")
        with CAM(model, "cam") as explain:
            explain(model(photographs()))
    with pytest.raises(ValueError, match="unknown CAM method 'gradcamm'; there are .*cam, gradcam"):
        CAM(network("resnet18"), "gradcamm")
    with pytest.raises(ValueError, match="no layer 'layer9'.*layer4"):
        CAM(network("resnet18"), layer="layer9")
    with pytest.raises(ValueError, match="name the layer to explain, one of 0, 1"):
        CAM(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten()))
    with pytest.raises(ValueError, match="outside torch.no_grad"):
        model = network("test_resnet")
        with torch.no_grad(), CAM(model) as explain:
            explain(model(torch.randn(2, 3, 64, 64)))


def test_a_layer_without_parts_of_its_own_can_be_explained_too():
    shortcut = torch.nn.Sequential()
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), shortcut, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    images, heats = torch.randn(2, 3, 12, 12), []
    for layer in (shortcut, "1", "0"):
        with CAM(model, "gradcam", layer) as explain:
            heats.append(explain(model(images)))
    assert heats[0].shape == (2, 10, 10) and torch.equal(heats[0], heats[1]) and torch.equal(heats[0], heats[2])


# --- inside training


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_the_losss_gradients_are_bit_for_bit_those_without_heat(name):
    images, labels = torch.randn(8, 3, 96, 96), torch.arange(8) % 7
    gradients = []
    for taken in (False, True):
        model = network(name, **({"img_size": 96} if name == "test_vit" else {})).train()
        torch.manual_seed(1)
        if taken:
            with CAM(model) as explain:
                logits = model(images)
                explain(logits, rows=[1, 5])
                assert all(p.grad is None for p in model.parameters())
                F.cross_entropy(logits, labels).backward()
        else:
            F.cross_entropy(model(images), labels).backward()
        assert model.training
        gradients.append([p.grad for p in model.parameters()] + list(model.buffers()))
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_nothing_is_left_behind():
    model = network("test_resnet")
    explain = CAM(model)
    for _ in range(3):
        with explain:
            logits = model(torch.randn(2, 3, 64, 64))
            explain(logits)
            held = weakref.ref(explain.activations[0])
    del logits
    gc.collect()
    assert held() is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_inside_a_long_block_activations_go_when_their_logits_go():
    model = network("test_resnet")
    with CAM(model) as explain:
        for _ in range(2):
            logits = model(torch.randn(2, 3, 64, 64))
            explain(logits)
            held = weakref.ref(explain.activations[0])
            del logits
            assert held() is None


def test_hooks_keep_the_layers_output_with_a_graph_from_it_to_the_logits():
    model, images = network("test_resnet"), torch.randn(2, 3, 64, 64)
    with CAM(model) as hooks:
        logits = model(images)
        kept, = hooks.activations.values()
        gradient, = torch.autograd.grad(logits[:, 0].sum(), kept)
        assert gradient.shape == kept.shape and gradient.abs().sum() > 0
        assert hooks.grid(kept).shape == kept.shape and hooks.layer is model.get_submodule(hooks.layer_name)
    assert hooks.activations == {}
    with hooks, pytest.raises(RuntimeError, match="has been entered already"):
        hooks.__enter__()


def test_a_frozen_network_has_the_same_heat():
    model, images = network("vgg11", **SMALLER["vgg11"]), photographs(96)
    with CAM(model) as explain:
        heat = explain(model(images))
    model.requires_grad_(False)
    with CAM(model) as explain:
        torch.testing.assert_close(explain(model(images)), heat)


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc to read resident memory")
def test_hundreds_of_steps_hold_on_to_nothing():
    model = network("test_resnet").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    held, alive = [], []
    with CAM(model, "gradcam++") as explain:
        for step in range(400):
            logits = model(images)
            upsample(explain(logits, rows=[0, 2]), 32)
            F.cross_entropy(logits, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step in (99, 399):
                gc.collect()
                held.append(resident_bytes())
                alive.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
    assert alive[1] == alive[0]
    assert held[1] - held[0] < 4 * 2**20


def ddp_worker(rank, folder, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = network("test_resnet").train()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    images = torch.randn(2, 4, 3, 64, 64, generator=torch.Generator().manual_seed(0))[rank]
    gradients = []
    for taken in (False, True):
        parallel.zero_grad()
        with CAM(parallel, "gradcam++") as explain:
            logits = parallel(images)
            heat = explain(logits, rows=[3, 0], classes=torch.tensor([1, 2])) if taken else None
            F.cross_entropy(logits, torch.arange(4)).backward()
        gradients.append([p.grad.clone() for p in parallel.parameters()])
    with CAM(model, "gradcam++") as explain:
        alone = explain(model(images), rows=[3, 0], classes=torch.tensor([1, 2]))
    results[rank] = torch.equal(heat, alone) and all(torch.equal(a, b) for a, b in zip(*gradients))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_under_distributed_data_parallel_heat_and_gradients_are_the_same(tmp_path):
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(ddp_worker, (str(tmp_path), results), nprocs=2)
        assert dict(results) == {0: True, 1: True}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_under_torch_compile_the_heat_is_the_same(name):
    model, images = network(name), photographs(160)
    with CAM(model) as explain:
        expected = explain(model(images))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    explain = CAM(compiled, layer=explain.layer_name)
    compiled(images)
    for _ in range(2):
        with explain:
            logits = compiled(images)
            torch.testing.assert_close(explain(logits), expected, atol=1e-5, rtol=0)
            logits.sum().backward()
    torch._dynamo.reset()


@pytest.mark.parametrize("method", cam.METHODS)
def test_the_heat_of_no_image_is_an_empty_one_by_every_method(method):
    torch.manual_seed(0)
    model = network("test_vit" if method in cam.ATTENTION else "test_resnet")
    with cam.CAM(model, method) as explain:
        logits = model(torch.randn(2, 3, 160, 160))
        heat = explain(logits, torch.zeros(0, dtype=torch.long))
        assert len(heat) == 0 and cam.upsample(heat, 160).shape == (0, 160, 160)
