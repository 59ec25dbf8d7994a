"""cam.py against the grad-cam library, the papers' equations, and its promises to a training loop."""

import contextlib
import gc
import os
import weakref

import numpy as np
import pytest
import pytorch_grad_cam as library
import timm
import torch
import torch.nn.functional as F
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

import cam
import run
from cam import CAM, upsample
from data import UserError

LIBRARY = {"gradcam": library.GradCAM, "gradcam++": library.GradCAMPlusPlus, "xgradcam": library.XGradCAM,
           "hirescam": library.HiResCAM, "layercam": library.LayerCAM, "elementwise": library.GradCAMElementWise,
           "eigencam": library.EigenCAM, "eigengradcam": library.EigenGradCAM}
# every family once, with the smallest image that keeps a 4x4 grid, or the one size that the network takes
FAMILIES = {"resnet18": 128, "resnext26ts": 128, "densenet121": 128, "vgg11": 128, "efficientnet_b0": 128,
            "tf_efficientnet_lite0": 128, "mobilenetv3_small_100": 128, "regnety_002": 128, "convnext_atto": 128, "repvgg_a0": 128,
            "vit_tiny_patch16_224": 224, "test_vit2": 160, "test_vit4": 160, "swin_tiny_patch4_window7_224": 224,
            "mixer_s32_224": 224, "mobilevit_xxs": 128}
SMALLER = {"vgg11": {"mlp_ratio": 0.1}, "swin_tiny_patch4_window7_224": {"depths": (1, 1, 2, 1)}}


def network(name, **arguments):
    """A network with random weights; its head too, which some families start at zero, where no heat is."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **arguments).eval()
    for head in (m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 7):
        torch.nn.init.normal_(head.weight, std=0.05)
    return model


def photographs(size=224, count=2):
    from sklearn.datasets import load_sample_images

    pictures = [torch.from_numpy(p.copy()).permute(2, 0, 1)[None] / 255 for p in load_sample_images().images]
    return F.interpolate(torch.cat(pictures)[:count], size=size, mode="bilinear", antialias=True) * 4 - 2


def vit_grid(tokens):
    return tokens[:, 1:].transpose(1, 2).unflatten(2, (14, 14))


def largest_difference(heat, theirs):
    return np.abs(heat.numpy() - theirs).max((1, 2))


@pytest.mark.parametrize("method", ["gradcam", "gradcam++"])
@pytest.mark.parametrize("name, layer, reshape", [("resnet18", "layer4", None),
                                                  ("vit_tiny_patch16_224", "blocks.11.norm1", vit_grid)])
def test_heat_is_the_librarys_to_1e5_in_float32(method, name, layer, reshape):
    model, images, classes = network(name), photographs(), [3, 5]
    with CAM(model, method) as explain:
        heat = upsample(explain(model(images), classes=torch.tensor(classes)), 224)
    assert explain.layer_name == layer
    with LIBRARY[method](model, [model.get_submodule(layer)], reshape_transform=reshape) as theirs:
        assert largest_difference(heat, theirs(images, [ClassifierOutputTarget(c) for c in classes])).max() <= 1e-5


def other_sign(kind):
    """The library's eigen method with the other of the two signs that a principal component may have."""
    return type("OtherSign", (kind,), {"get_cam_image": lambda self, *a, **k: -kind.get_cam_image(self, *a, **k)})


@pytest.mark.parametrize("name, size", FAMILIES.items())
def test_every_method_is_the_librarys_to_1e5_on_every_family(name, size):
    model, images, classes = network(name, **SMALLER.get(name, {})).double(), photographs(size).double(), [3, 5]
    targets = [ClassifierOutputTarget(c) for c in classes]
    for method, kind in LIBRARY.items():
        with CAM(model, method) as explain:
            heat = upsample(explain(model(images), classes=torch.tensor(classes)), size)
            differences = []
            for variant in (kind, other_sign(kind)) if "eigen" in method else (kind,):
                with variant(model, explain.layers, reshape_transform=explain.grid) as theirs:
                    differences.append(largest_difference(heat, theirs(images, targets)))
                if np.max(differences[-1]) <= 1e-5:
                    break
        assert heat.dtype == torch.float64 and heat.amax() == 1
        assert np.min(differences, axis=0).max() <= 1e-5, method


def test_eigen_smoothing_is_the_librarys():
    model, images = network("resnet18").double(), photographs().double()
    targets = [ClassifierOutputTarget(c) for c in (3, 5)]
    for method in ("gradcam", "layercam"):
        with CAM(model, method, smooth=True) as explain:
            heat = upsample(explain(model(images), classes=torch.tensor([3, 5])), 224)
        kind, differences = LIBRARY[method], []
        for sign in (1, -1):
            smooth = type("Smooth", (kind,), {"get_cam_image": lambda self, *a, **k: sign * kind.get_cam_image(self, *a, **k)})
            with smooth(model, [model.layer4]) as theirs:
                differences.append(largest_difference(heat, theirs(images, targets, eigen_smooth=True)))
        assert np.min(differences, axis=0).max() <= 1e-5


def test_several_layers_are_averaged_as_the_library_does():
    model, images = network("resnet18").double(), photographs().double()
    with LIBRARY["layercam"](model, [model.layer3, model.layer4]) as theirs:
        expected = theirs(images, [ClassifierOutputTarget(c) for c in (3, 5)])
    for layers in ("layer3,layer4", [model.layer3, "layer4"]):
        with CAM(model, "layercam", layers) as explain:
            heat = explain(model(images), classes=torch.tensor([3, 5]))
            assert heat.shape == (2, 224, 224) and explain.layer_name == "layer3,layer4"
            assert explain(model(images), rows=[]).shape == (0, 224, 224)
        assert largest_difference(heat, expected).max() <= 1e-5


def test_a_margin_is_explained_as_the_difference_of_two_logits():
    model, images, labels = network("resnet18").double(), photographs().double(), torch.tensor([3, 5])
    with CAM(model, "hirescam") as explain:
        logits = model(images)
        classes, against = cam.EXPLAIN["margin"](logits, labels)
        heat = upsample(explain(logits, classes=classes, against=against), 224)
    ranked = logits.detach().argsort(1, descending=True)
    best = [next(c for c in row if c != label) for row, label in zip(ranked.tolist(), labels.tolist())]
    assert classes.tolist() == labels.tolist() and against.tolist() == best

    def margin(label, other):
        return lambda output: output[label] - output[other]

    with LIBRARY["hirescam"](model, [model.layer4]) as theirs:
        expected = theirs(images, [margin(a, b) for a, b in zip(labels.tolist(), best)])
    assert largest_difference(heat, expected).max() <= 1e-5
    with CAM(model, "cam") as explain:  # linear in the logits, so the same
        by_weights = upsample(explain(model(images), classes=classes, against=against), 224)
    torch.testing.assert_close(by_weights, heat, atol=1e-6, rtol=0)
    assert cam.EXPLAIN["true"](logits, labels) == (labels, None)
    assert torch.equal(cam.EXPLAIN["predicted"](logits, labels)[0], ranked[:, 0])


# --- attention


def unfused(model):
    """Make a ViT compute its attention probabilities where a hook can see them; they are kept in the list returned."""
    kept = []

    def keep(module, args, output):
        output.retain_grad()
        kept.append(output)

    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(keep)
    return kept


@pytest.mark.parametrize("name, first", [("test_vit", 0), ("test_vit2", None), ("vit_tiny_patch16_224", 0)])
def test_rollouts_follow_their_papers_equations(name, first):
    size = timm.get_pretrained_cfg(name).input_size[-1]
    model, images = network(name).double(), photographs(size).double()
    with CAM(model, "rollout") as rollout, CAM(model, "gradrollout") as gradrollout:
        logits = model(images)
        heats = {"rollout": rollout(logits, classes=3), "gradrollout": gradrollout(logits, classes=3)}
        one = gradrollout(logits, rows=[1], classes=torch.tensor([3]))
    torch.testing.assert_close(one[0], heats["gradrollout"][1])

    kept = unfused(model)
    model(images)[:, 3].sum().backward()
    side, prefix = heats["rollout"].shape[1], model.num_prefix_tokens
    for image in range(2):
        mixed = relevance = torch.eye(kept[0].shape[-1], dtype=torch.float64)
        for attention in kept:
            A, G = attention[image].detach(), attention.grad[image]
            mixed = (0.5 * A.mean(0) + 0.5 * torch.eye(len(mixed))) @ mixed  # Abnar and Zuidema, section 3
            relevance = relevance + (G * A).clamp(min=0).mean(0) @ relevance  # Chefer et al., equations 5 and 6
        for method, R in (("rollout", mixed), ("gradrollout", relevance)):
            row = R[first] if first is not None else R[prefix:].mean(0)
            expected = row[prefix:].view(side, side)
            expected = (expected - expected.min()) / (expected.max() - expected.min())
            torch.testing.assert_close(heats[method][image], expected, atol=1e-9, rtol=0)


def test_rollout_takes_no_gradient_and_leaves_the_logits_as_they_are():
    model, images = network("test_vit"), photographs(160)
    with torch.no_grad():
        plain = model(images)
        with CAM(model, "rollout") as explain:
            logits = model(images)
            assert explain(logits).shape == (2, 10, 10) and torch.equal(logits, plain)
            assert explain(logits, rows=[]).shape == (0, 10, 10)


def test_where_attention_cannot_be_followed_the_error_says_what_would_serve():
    for name in ("resnet18", "mixer_s32_224"):
        with pytest.raises(ValueError, match="rollout needs a transformer .*; use gradcam or"):
            CAM(network(name), "rollout")
    with pytest.raises(ValueError, match="rollout needs attention over the whole image"):
        model = network("swin_tiny_patch4_window7_224")
        with torch.no_grad(), CAM(model, "rollout") as explain:
            explain(model(photographs()))
    with pytest.raises(ValueError, match="leave the layer out"):
        CAM(network("test_vit"), "rollout", layer="blocks.0")
    with pytest.raises(ValueError, match="more than a softmax of q k"):  # its positions are added to q k^T
        model = network("beit_base_patch16_224", depth=2)
        for block in model.blocks:
            torch.nn.init.normal_(block.attn.relative_position_bias_table, std=3.0)
        with torch.no_grad(), CAM(model, "rollout") as explain:
            explain(model(photographs()))


# --- controls


def test_the_controls_look_at_nothing():
    model = network("resnet18")
    with torch.no_grad(), CAM(model, "center") as center, CAM(model, "random") as random:
        logits = model(photographs())
        middle, first, second = center(logits), random(logits), random(logits)
    distance = (torch.arange(7) / 7 - 3 / 7) ** 2
    gaussian = torch.exp(-(distance[:, None] + distance) / (2 * 0.25**2))
    torch.testing.assert_close(middle[0], (gaussian - gaussian.min()) / (1 - gaussian.min()))
    assert torch.equal(middle[0], middle[1])
    assert not torch.allclose(first, second) and not torch.allclose(first[0], first[1])
    steps = (upsample(first, 64)[:, :, 1:] - upsample(first, 64)[:, :, :-1]).abs()
    assert steps.max() < 0.1  # smooth: no jumps between neighbours


# --- the papers


def test_cam_is_gradcam_where_pooling_and_a_linear_head_end_the_network():
    model, images = network("resnet18"), photographs()
    with CAM(model, "cam") as explain, CAM(model, "gradcam") as by_gradient:
        logits = model(images)
        torch.testing.assert_close(explain(logits), by_gradient(logits), atol=1e-5, rtol=0)


def test_cam_takes_no_gradient():
    model = network("resnet18")
    with torch.no_grad(), CAM(model, "cam") as explain:
        assert explain(model(photographs())).shape == (2, 7, 7)


def test_gradcam_plus_plus_is_equation_19_where_gradients_outweigh_the_constant():
    torch.manual_seed(0)
    A, G = torch.rand(1, 3, 4, 5, dtype=torch.float64), 10 * torch.randn(1, 3, 4, 5, dtype=torch.float64)
    weights = []
    for k in range(3):
        weight = 0.0
        for i in range(4):
            for j in range(5):
                g = G[0, k, i, j].item()
                alpha = g**2 / (2 * g**2 + sum(A[0, k].flatten().tolist()) * g**3)
                weight += alpha * max(g, 0.0)
        weights.append(weight)
    expected = sum(w * A[0, k] for k, w in enumerate(weights))
    torch.testing.assert_close((cam.gradcam_plus_plus(A, G) * A).sum(1)[0], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name, size, layer, grid", [
    ("resnet18", 224, "layer4", 7), ("resnet18", 64, "layer3", 4), ("resnet18", 32, "layer2", 4),
    ("resnet50", 224, "layer4", 7), ("efficientnet_b0", 224, "bn2", 7), ("tf_efficientnet_lite0", 128, "bn2", 4),
    ("vgg16", 224, "features.30", 7), ("convnext_tiny", 224, "stages.3", 7), ("convnext_tiny", 64, "stages.2", 4),
    ("swin_tiny_patch4_window7_224", 224, "norm", 7), ("vit_tiny_patch16_224", 224, "blocks.11.norm1", 14),
    ("test_vit", 160, "blocks.5.norm1", 10), ("densenet121", 224, "features.norm5", 7),
    ("resnext50_32x4d", 224, "layer4", 7), ("mobilenetv3_large_100", 224, "blocks.6", 7), ("regnety_002", 224, "s4", 7),
    ("deit_tiny_distilled_patch16_224", 224, "blocks.11.norm1", 14), ("deit3_small_patch16_224", 224, "blocks.11.norm1", 14),
    ("vit_base_patch16_siglip_224", 224, "norm", 14), ("vit_small_patch14_reg4_dinov2", 518, "blocks.11.norm1", 37),
    ("swinv2_tiny_window8_256", 256, "norm", 8), ("mixer_s32_224", 224, "norm", 7), ("maxvit_nano_rw_256", 256, "norm", 8),
    ("coatnet_nano_rw_224", 224, "norm", 7), ("mobilevit_s", 256, "final_conv", 8), ("cait_xxs24_224", 224, "blocks.23.norm1", 14)])
def test_the_rule_explains_the_deepest_layer_with_a_4x4_grid(name, size, layer, grid):
    model = network(name).train()
    config = {"model": name, "cam": "gradcam", "layer": None, "smooth": False, "image_size": size}
    assert run.try_network(config, model) == (layer, (grid, grid))
    assert model.training


@pytest.mark.parametrize("name, size, layer, grid", [("resnet18", 224, "layer3", 14), ("resnet18", 32, "layer3", 2), ("tf_efficientnet_lite0", 128, "blocks.4", 8),
                                                     ("vit_tiny_patch16_224", 224, "blocks.10.norm1", 14), ("swin_tiny_patch4_window7_224", 224, "layers.2", 14)])
def test_a_layer_can_be_counted_from_the_end(name, size, layer, grid):
    model = network(name)
    config = {"model": name, "cam": "layercam", "layer": "-2", "smooth": False, "image_size": size}
    assert run.try_network(config, model) == (layer, (grid, grid))
    with pytest.raises(UserError, match="has no layer -99: it has .* stages, "):
        run.try_network(config | {"layer": "-99"}, model)
    with pytest.raises(UserError, match="no layer '-0'"):
        run.try_network(config | {"layer": "-0"}, model)


def test_images_need_not_be_square():
    model = network("vit_tiny_patch16_224", img_size=(96, 160))
    with CAM(model) as explain:
        heat = explain(model(torch.randn(2, 3, 96, 160)))
    assert heat.shape == (2, 6, 10)
    assert upsample(heat, (96, 160)).shape == (2, 96, 160)


def test_what_does_not_fit_is_an_error_that_says_what_would():
    with pytest.raises(ValueError, match="no layer keeps a 4x4 grid.*use larger images, or name a layer"):
        model = network("test_resnet")
        with CAM(model):
            model(torch.randn(2, 3, 6, 6))
    with pytest.raises(ValueError, match="cam needs a linear head on the global average.*use gradcam"):
        model = network("vit_tiny_patch16_224")
        with CAM(model, "cam") as explain:
            explain(model(photographs()))
    with pytest.raises(ValueError, match="unknown CAM method 'gradcamm'; there are cam, gradcam"):
        CAM(network("resnet18"), "gradcamm")
    with pytest.raises(ValueError, match="no layer 'layer9'.*layer4"):
        CAM(network("resnet18"), layer="layer9")
    with pytest.raises(ValueError, match="name the layer to explain, one of 0, 1"):
        CAM(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten()))
    with pytest.raises(ValueError, match="outside torch.no_grad"):
        model = network("test_resnet")
        with torch.no_grad(), CAM(model) as explain:
            explain(model(torch.randn(2, 3, 64, 64)))


def test_a_plain_module_is_explained_at_the_layer_given():
    torch.manual_seed(0)
    body = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
    model = torch.nn.Sequential(body, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 4))
    images = torch.randn(2, 3, 12, 12)
    for layer in (body, "0"):
        with CAM(model, "gradcam", layer) as explain:
            heat = explain(model(images), classes=1)
    weights = model[3].weight[1] / 100
    expected = cam.rescale((weights[:, None, None] * body(images)).sum(1).relu()).detach()
    torch.testing.assert_close(heat, expected)


def test_rows_are_explained_as_they_would_be_among_all():
    model, images = network("test_resnet"), torch.randn(6, 3, 64, 64)
    with CAM(model, "gradcam++") as explain:
        logits = model(images)
        everything = explain(logits, classes=torch.arange(6))
        torch.testing.assert_close(explain(logits, rows=[4, 1], classes=torch.tensor([4, 1])), everything[[4, 1]])
        picked = torch.tensor([False, True, False, False, True, False])
        torch.testing.assert_close(explain(logits, rows=picked, classes=torch.tensor([1, 4])), everything[[1, 4]])
        assert explain(logits, rows=[]).shape == (0, 4, 4)
        assert upsample(explain(logits, rows=[]), 64).shape == (0, 64, 64)
    assert everything.amin((1, 2)).eq(0).all() and everything.amax((1, 2)).eq(1).all()


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
            held = weakref.ref(explain._activations[0])
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
            held = weakref.ref(explain._activations[0])
            del logits
            assert held() is None


def test_a_frozen_network_has_the_same_heat():
    model, images = network("vgg11"), photographs(96)
    with CAM(model) as explain:
        heat = explain(model(images))
    model.requires_grad_(False)
    with CAM(model) as explain:
        torch.testing.assert_close(explain(model(images)), heat)


def test_double_stays_double():
    model, images = network("test_resnet").double(), torch.randn(2, 3, 160, 160)
    for method in (*LIBRARY, "cam", "center", "random"):
        with CAM(model, method) as explain:
            assert explain(model(images.double())).dtype == torch.float64


class Scaled(torch.nn.Module):
    """A block whose output is `factor` times as large."""

    def __init__(self, block, factor):
        super().__init__()
        self.block, self.factor = block, factor

    def forward(self, x):
        return self.block(x) * self.factor


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("factor", [1e-4, 1e-2, 1.0, 1e2, 1e4])
@pytest.mark.parametrize("back", [False, True], ids=["logits scale too", "the head scales back"])
def test_half_precision_gives_the_float32_heat_at_every_scale(dtype, factor, back):
    images = photographs()
    for name in ("resnet18", "convnext_atto"):
        model = network(name)
        layer = "layer4" if name == "resnet18" else "stages"
        setattr(model, layer, Scaled(model.get_submodule(layer), factor))
        if back:
            model.get_classifier().weight.data /= factor
        heats = []
        for amp in (False, True):
            with contextlib.ExitStack() as blocks:
                explains = [blocks.enter_context(CAM(model, method, layer)) for method in
                            ("gradcam", "hirescam", "layercam", "elementwise", "eigencam", "eigengradcam")]
                with torch.autocast("cpu", dtype=dtype, enabled=amp):
                    logits = model(images)
                assert logits.dtype == (dtype if amp else torch.float32)
                heats.append(torch.stack([upsample(e(logits, classes=torch.tensor([3, 1])), 224).flatten(1) for e in explains]))
        assert heats[1].dtype == torch.float32 and heats[1].isfinite().all()
        nothing = (heats[0].amax(2) == 0) & (heats[1].amax(2) == 0)  # no evidence for the class, in either precision
        alike = F.cosine_similarity(*heats, dim=2)
        assert ((alike >= 0.999) | nothing).all() and nothing.sum() <= 4, (name, alike)


# --- inside training


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


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


def test_under_distributed_data_parallel_heat_and_gradients_are_the_same(tmp_path):
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(ddp_worker, (str(tmp_path), results), nprocs=2)
        assert dict(results) == {0: True, 1: True}


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


def test_a_map_without_contrast_is_cold_everywhere():
    assert cam.rescale(torch.full((1, 3, 3), 0.7)).eq(0).all()
    assert cam.rescale(torch.full((1, 3, 3), float("nan"))).eq(0).all()
