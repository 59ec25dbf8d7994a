"""cam.py against the grad-cam library and the papers' equations."""

import contextlib
import gc
import subprocess
import sys
import types
import weakref
from pathlib import Path

import numpy as np
import pytest
import pytorch_grad_cam as library
import timm
import torch
import torch.nn.functional as F
import torchvision
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

import cam
from cam import CAM, upsample
from engine import hooks
from engine.files import UserError
from engine.network import try_network

LIBRARY = {"gradcam": library.GradCAM, "gradcam++": library.GradCAMPlusPlus, "xgradcam": library.XGradCAM,
           "hirescam": library.HiResCAM, "layercam": library.LayerCAM, "elementwise": library.GradCAMElementWise,
           "eigencam": library.EigenCAM, "eigengradcam": library.EigenGradCAM}
# every family once, with the smallest image that keeps a 4x4 grid, or the one size that the network takes
FAMILIES = {"resnet18": 128, "resnext26ts": 128, "densenet121": 128, "vgg11": 128, "efficientnet_b0": 128,
            "tf_efficientnet_lite0": 128, "mobilenetv3_small_100": 128, "regnety_002": 128, "convnext_atto": 128,
            "repvgg_a0": 128, "vit_tiny_patch16_224": 224, "test_vit2": 160, "test_vit4": 160,
            "swin_tiny_patch4_window7_224": 224, "mixer_s32_224": 224, "mobilevit_xxs": 128}
SMALLER = {"vgg11": {"mlp_ratio": 0.1}, "swin_tiny_patch4_window7_224": {"depths": (1, 1, 2, 1)}}
QUICK = {"resnet18", "mobilenetv3_small_100", "regnety_002", "mobilevit_xxs", "test_vit2", "test_vit4"}


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


EACH_FAMILY = pytest.mark.parametrize("name, size", [
    pytest.param(*family, marks=[pytest.mark.slow] * (family[0] not in QUICK)) for family in FAMILIES.items()])


def difference(heat, method, explain, images, targets):
    """The largest difference of heat, [N, H, W], to the library's; of eigen methods, to the nearer of its signs."""
    kind, differences = LIBRARY[method], []
    for variant in (kind, other_sign(kind)) if "eigen" in method else (kind,):
        with variant(explain.model, [explain.layer], reshape_transform=explain.grid) as theirs:
            differences.append(largest_difference(heat, theirs(images, targets)))
        if np.max(differences[-1]) <= 1e-5:
            break
    return np.min(differences, axis=0).max()


@EACH_FAMILY
def test_every_method_is_the_librarys_to_1e5_on_every_family(name, size):
    model, images, classes = network(name, **SMALLER.get(name, {})).double(), photographs(size).double(), [3, 5]
    for method in LIBRARY:
        with CAM(model, method) as explain:
            heat = upsample(explain(model(images), classes=torch.tensor(classes)), size)
            assert heat.dtype == torch.float64 and heat.amax() == 1
            targets = [ClassifierOutputTarget(c) for c in classes]
            assert difference(heat, method, explain, images, targets) <= 1e-5, method


@EACH_FAMILY
def test_a_losses_own_backward_pass_brings_the_librarys_heat_of_the_cross_entropy(name, size):
    model, images, labels = network(name, **SMALLER.get(name, {})).double(), photographs(size).double(), [3, 5]
    targets = [lambda output, label=label: F.cross_entropy(output, torch.tensor(label)) for label in labels]
    for method in set(LIBRARY) - cam.NO_GRADIENT:
        found = []
        with CAM(model, method) as explain:
            loss = F.cross_entropy(model(images), torch.tensor(labels))
            explain.in_backward(loss, 2, torch.tensor([1, 0]), lambda heat: found.append(heat()))
        assert not found
        (1024 * loss).backward()  # as a gradient scaler has it
        assert difference(upsample(found[0].flip(0), size), method, explain, images, targets) <= 1e-5, method
        assert not explain.activations


@pytest.mark.parametrize("mixed", [False, True], ids=["labels", "shares of classes"])
@pytest.mark.parametrize("name, method", [("test_resnet", "gradcam++"), ("test_efficientnet", "layercam"),
                                          ("test_vit", "gradcam"), ("test_vit", "gradrollout")])
def test_in_training_the_loss_brings_the_heat_that_its_score_gives_with_all_images(name, method, mixed):
    model, images = network(name).train().double(), torch.randn(4, 3, 160, 160, dtype=torch.float64)
    labels, rows, found = torch.tensor([1, 0, 3, 6]), torch.tensor([3, 1]), []
    labels = 0.7 * F.one_hot(labels, 7).double() + 0.3 * F.one_hot(labels.flip(0), 7) if mixed else labels
    with CAM(model, method) as explain:
        logits = model(images)
        expected = explain(logits, None, *cam.EXPLAIN["loss"](logits, labels))[rows]
        loss = F.cross_entropy(logits, labels)
        explain.in_backward(loss, 4, rows, lambda heat: found.append(heat()))
    loss.div(2).backward()
    torch.testing.assert_close(found[0], expected, atol=1e-6, rtol=0)
    assert found[0].amax() == 1


def test_nothing_of_a_step_outlives_its_backward_pass():
    """A hook and the graph that it hangs on hold each other, beyond the reach of counted references."""
    model, images, labels = network("test_resnet").train(), torch.randn(2, 3, 64, 64), torch.tensor([0, 1])
    explain, kept = CAM(model, "gradcam"), []
    gc.disable()
    try:
        for _ in range(2):
            with explain:
                logits = model(images)
                loss = F.cross_entropy(logits, labels)
                copies = type("Copies", (), {})()

                def erase(heat, copies=copies):
                    copies.heat = heat()

                explain.in_backward(loss, 2, torch.arange(2), erase)
            loss.backward()
            assert copies.heat.shape == (2, 4, 4)
            kept += [weakref.ref(copies), weakref.ref(logits)]
            del copies, erase, logits, loss
        assert not any(each() is not None for each in kept)
    finally:
        gc.enable()


def maps_of(kind, images, channels, side, seed):
    """Random maps, all of them or all but one of their principal components alike."""
    draw = torch.Generator().manual_seed(seed)
    maps = torch.randn(images, channels, side, side, generator=draw)
    if kind == "rank one":
        return maps[:, :1] * torch.randn(images, channels, 1, 1, generator=draw)
    if kind == "equal":  # as many orthogonal patterns of one size as there are channels
        patterns = torch.linalg.qr(maps.double().flatten(2).transpose(1, 2)
                                   - maps.double().flatten(2).mean(2)[:, None])[0]
        return patterns.transpose(1, 2).reshape(images, -1, side, side).float()
    return {"normal": maps, "sparse": maps.relu() * torch.rand(images, channels, 1, 1, generator=draw) * 30,
            "tiny": maps * 1e-20, "huge": maps * 1e18, "far from zero": maps + 100}[kind]


@pytest.mark.parametrize("kind", ["normal", "sparse", "rank one", "equal", "tiny", "huge", "far from zero"])
def test_the_first_principal_component_is_the_singular_value_decompositions(kind):
    for seed, (channels, side) in enumerate([(512, 7), (8, 14), (64, 4), (3, 5), (200, 14)]):
        maps = maps_of(kind, 8, channels, side, seed)
        points = maps.double().flatten(2)
        _, values, vectors = torch.linalg.svd(points - points.mean(2, keepdim=True), full_matrices=False)
        found = hooks.principal(maps).double().flatten(1)
        assert (found.amax(1) >= -found.amin(1)).all()
        found = F.normalize(found)
        within = torch.einsum("nkp,np->nk", vectors, found) ** 2  # of which components it is made
        explained = (within * values**2).sum(1) / values[:, 0] ** 2
        torch.testing.assert_close(explained, torch.ones_like(explained), atol=1e-5, rtol=0)
        if kind != "equal":
            assert within[:, 0].min() > 0.999


def test_maps_without_contrast_have_no_principal_component():
    assert hooks.principal(torch.full((2, 5, 3, 3), 7.0)).eq(0).all()
    assert cam.rescale(hooks.principal(torch.full((1, 5, 3, 3), float("nan")))).eq(0).all()
    assert torch.get_float32_matmul_precision() == "highest"  # as it was
    torch.set_float32_matmul_precision("high")
    hooks.principal(torch.randn(1, 5, 3, 3))
    assert torch.get_float32_matmul_precision() == "high"
    torch.set_float32_matmul_precision("highest")


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


def test_where_attention_cannot_be_followed_the_error_names_what_would_serve():
    for name in ("resnet18", "mixer_s32_224"):
        with pytest.raises(ValueError, match="rollout needs a transformer whose blocks .*; use gradcam"):
            CAM(network(name), "rollout")
    with pytest.raises(ValueError, match="rollout needs attention over all of the image.* use gradcam, or larger"):
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


def test_the_controls_depend_on_neither_image_nor_network():
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


def test_images_need_not_be_square():
    model = network("vit_tiny_patch16_224", img_size=(96, 160))
    with CAM(model) as explain:
        heat = explain(model(torch.randn(2, 3, 96, 160)))
    assert heat.shape == (2, 6, 10)
    assert upsample(heat, (96, 160)).shape == (2, 96, 160)


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
                explained = [upsample(e(logits, classes=torch.tensor([3, 1])), 224) for e in explains]
                heats.append(torch.stack(explained).flatten(2))
        assert heats[1].dtype == torch.float32 and heats[1].isfinite().all()
        nothing = (heats[0].amax(2) == 0) & (heats[1].amax(2) == 0)  # no evidence for the class, in either precision
        alike = F.cosine_similarity(*heats, dim=2)
        assert ((alike >= 0.999) | nothing).all() and nothing.sum() <= 4, (name, alike)


def test_a_map_without_contrast_is_cold_everywhere():
    assert cam.rescale(torch.full((1, 3, 3), 0.7)).eq(0).all()
    assert cam.rescale(torch.full((1, 3, 3), float("nan"))).eq(0).all()


# --- networks of others, in their own loops


def test_the_class_token_of_torchvisions_vit_is_left_out():
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(64, 16, 2, 2, 32, 64, num_classes=7).eval()
    torch.nn.init.normal_(model.heads.head.weight)  # it starts at zero, where no heat is
    layer, images = "encoder.layers.encoder_layer_1.ln_1", photographs(64)
    with CAM(model, layer=layer) as explain:
        heat = upsample(explain(model(images), classes=torch.tensor([3, 5])), 64)

    def patches(tokens):
        return tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    with library.GradCAM(model, [model.get_submodule(layer)], reshape_transform=patches) as theirs:
        expected = theirs(images, [ClassifierOutputTarget(c) for c in (3, 5)])
    assert heat.amax() == 1 and largest_difference(heat, expected).max() <= 1e-5


class Tokens(torch.nn.Module):
    """As Hugging Face's networks: images by name, layers that give tuples, an output that is an object.

    first: tokens in front of the patches, of which the head reads the first, or where there is none the patches' mean.
    """

    def __init__(self, first):
        super().__init__()
        self.patches, self.mix = torch.nn.Conv2d(3, 8, 16, 16), Tupled(8)
        self.first, self.head = torch.nn.Parameter(torch.randn(1, first, 8)), torch.nn.Linear(8, 7)

    def forward(self, labels=None, pixel_values=None):
        patches = self.patches(pixel_values).flatten(2).transpose(1, 2)
        tokens, _ = self.mix(torch.cat([self.first.expand(len(patches), -1, -1), patches], dim=1))
        tokens = tokens + tokens.mean(1, keepdim=True)
        return types.SimpleNamespace(logits=self.head(tokens[:, 0] if self.first.numel() else tokens.mean(1)))


class Tupled(torch.nn.Linear):
    def __init__(self, width):
        super().__init__(width, width)

    def forward(self, x):
        return super().forward(x), None


@pytest.mark.parametrize("wrap", [lambda net: net, torch.nn.DataParallel, lambda net: net.requires_grad_(False)],
                         ids=["as it is", "DataParallel", "frozen"])
@pytest.mark.parametrize("first, height, width", [(0, 64, 64), (1, 64, 64), (2, 96, 96), (5, 64, 64), (1, 64, 128)])
def test_tokens_in_front_of_the_patches_are_told_by_the_grid_that_is_left(first, height, width, wrap):
    torch.manual_seed(0)
    net, images = wrap(Tokens(first)), torch.randn(2, 3, height, width)
    with CAM(net, layer="mix") as explain:
        logits = net(labels=torch.tensor([1, 2]), pixel_values=images).logits
        heat = explain(logits)
        kept = explain.activations[0].detach()
        assert torch.equal(explain.grid(kept).flatten(2), kept[:, first:].transpose(1, 2))
    assert heat.shape == (2, height // 16, width // 16) and heat.amax() == 1


def test_a_layer_in_front_of_one_that_works_in_place_has_the_heat_that_it_has_without():
    heats = []
    for inplace in (False, True):
        for frozen in (False, True):
            torch.manual_seed(0)
            model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(inplace), torch.nn.AdaptiveAvgPool2d(2),
                                        torch.nn.Flatten(), torch.nn.Linear(32, 4)).requires_grad_(not frozen)
            with CAM(model, "xgradcam", "0") as explain:
                heats.append(explain(model(torch.randn(2, 3, 12, 12))))
    assert heats[0].amax() == 1 and all(torch.equal(heat, heats[0]) for heat in heats)


def test_heat_that_is_asked_of_the_wrong_thing_or_too_late_is_an_error_that_says_so():
    model, images = network("test_resnet"), torch.randn(2, 3, 64, 64)
    with CAM(model, layer="layer3") as explain:
        logits = model(images)
        for wrong, found in ((images, r"\[2, 3, 64, 64\]"), (logits[:, 0], r"\[2\]"), (logits[:1], r"\[1, 7\]"),
                             (types.SimpleNamespace(logits=logits), "SimpleNamespace")):
            with pytest.raises(ValueError, match=rf"expected the logits of that pass, \[2, classes\]; found .*{found}"):
                explain(wrong)
        earlier = logits
        logits = model(images)
        with pytest.raises(ValueError, match="name a layer that the logits depend on"):
            explain(earlier)
        F.cross_entropy(logits, torch.tensor([1, 2])).backward()
        with pytest.raises(ValueError, match="ask before loss.backward()"):
            explain(logits)
        with pytest.raises(ValueError, match=r"expected a forward pass of images, \[B, 3, H, W\]"):
            model(images[0])


def test_a_layer_whose_patches_nothing_reads_is_refused():
    model, images = network("test_vit"), photographs(160)
    with CAM(model, layer="blocks.5") as explain, pytest.raises(ValueError, match="behind layer blocks.5 a class"):
        explain(model(images))
    config = {"model": "test_vit", "cam": "gradcam", "layer": "blocks.5", "image_size": 160}
    with pytest.raises(UserError, match="--cam gradcam with test_vit with images of 160x160: behind layer blocks.5"):
        try_network(config, model)


@pytest.mark.slow
def test_this_file_serves_alone_where_a_layer_is_named(tmp_path):
    (tmp_path / "cam.py").write_bytes(Path(cam.__file__).read_bytes())
    script = """
import timm, torch
from cam import CAM, upsample
net = timm.create_model("test_resnet")
with CAM(net, "layercam", layer="layer3") as explain:
    assert upsample(explain(net(torch.randn(2, 3, 64, 64))), 64).shape == (2, 64, 64)
try:
    CAM(net)
except ValueError as error:
    print(error)
"""
    answer = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert answer.returncode == 0 and "without engine/hooks.py beside cam.py, name the layer" in answer.stdout, answer
