"""What some CAMs need beside a named layer: the rule that picks one, attention, a linear head, a principal component.

The first three are parts of a `cam.CAM`, whose hooks, gradients and maps they use. `cam.py` serves without this file
where a layer is named and the method weighs activations by a gradient.
"""

import contextlib

import torch
import torch.nn.functional as F

SQUARINGS = 20  # of a Gram matrix: in its 2^20th power even a ratio of 0.9999 to the second eigenvalue is gone


class Rule:
    """Picks the layer to explain at the first forward pass: the deepest stage that keeps a grid, or the -layer-th.

    cam: the `cam.CAM`. layer: None, or a number from the end as "-2". Raises ValueError where no layer serves.
    """

    def __init__(self, cam, layer):
        self.cam, self.number, self.kept = cam, int(layer or 0), []
        self.stages = [info["module"] for info in getattr(cam.model, "feature_info", [])]
        if not self.stages:
            raise ValueError("this network does not name its stages: name the layer to explain, one of "
                             f"{', '.join(name for name in cam.names.values() if name)}")

    def add_hooks(self):
        """Keep what every module gives, until the network's own output is there and the layer is chosen."""
        if self.cam.layer is not None:
            return
        for name, module in self.cam.model.named_modules():
            if name:
                self.cam.hook(module.register_forward_hook, lambda m, i, output, name=name: self.keep(name, output))
        self.cam.hook(self.cam.model.register_forward_hook, lambda *_: self.choose())

    def release(self):
        self.kept = []

    def keep(self, name, output):
        if self.cam.layer is None and torch.is_tensor(output) and output.is_floating_point() and output.dim() > 2:
            output = self.cam.with_gradient(output)
            self.kept.append((name, output))
            return output

    def choose(self):
        """Fix the explained layer, from the names and outputs that the first forward pass went through."""
        if self.cam.layer is not None:
            return
        least, kept, self.kept = self.cam.min_grid, self.kept, []
        grids = {name: grid.shape[-2:] for name, output in kept if (grid := self.cam.grid(output)) is not None}
        allowed = self.allowed([name for name, _ in kept], grids)
        fine = [(name, output) for name, output in kept
                if name in allowed and name in grids and (self.number or min(grids[name]) >= least)]
        if not fine:
            sizes = ", ".join(f"{name} {h}x{w}" for name, (h, w) in grids.items() if name in allowed) or "none"
            raise ValueError(f"no layer keeps a {least}x{least} grid for images of {self.cam.height}x{self.cam.width} "
                             f"(grids: {sizes}): use larger images, or name a layer")
        deepest = fine[-1][1]
        # Several modules may give this very tensor, as an identity or a container: the stage or the outermost names it.
        same = [name for name, output in fine if output is deepest]
        name = min(same, key=lambda name: (name not in self.stages, name.count(".")))
        self.cam.explain_layer(self.cam.model.get_submodule(name), deepest)

    def allowed(self, order, grids):
        """Names that the rule allows. order: all names as they ran. grids: {name: (h, w)} of those that have one."""
        stages = [name for name in order if name in self.stages]
        if not stages:
            serve = [name for name, sides in grids.items() if min(sides) >= self.cam.min_grid and name.count(".") < 4]
            raise ValueError("this network does not give its stages as one tensor each: name the layer to explain, as "
                             f"{' or '.join(serve[-4:]) or 'none that keeps a grid'}")
        if -self.number > len(stages):
            raise ValueError(f"this network has no layer {self.number}: it has {len(stages)} stages, "
                             f"{', '.join(stages)}")
        if reads_class_token(self.cam):
            return [name for name in order if name.startswith(stages[self.number or -1] + ".")][:1]
        if self.number:
            return [stages[self.number]]
        # What follows the last stage counts where it is a part of the network's own, as a last norm or convolution.
        return [*stages, *(name for name in order[order.index(stages[-1]):] if "." not in name)]


def reads_class_token(cam):
    """Whether the network's head reads a class token alone, and no patch."""
    return cam.prefix > 0 and getattr(cam.model, "global_pool", "token") in ("token", "")


class Head:
    """The linear head on a global average, whose weights the method `cam` takes."""

    def __init__(self, cam):
        head = cam.model.get_classifier() if hasattr(cam.model, "get_classifier") else None
        head = head or next((m for m in reversed(list(cam.model.modules())) if isinstance(m, torch.nn.Linear)), None)
        if not isinstance(head, torch.nn.Linear):
            raise ValueError("cam needs a network that ends in global average pooling and one linear layer; use "
                             "gradcam")
        self.cam, self.linear, self.pooled, self.checked = cam, head, None, False

    def add_hooks(self):
        def keep_pooled(module, args):
            self.pooled = args[0].detach()

        self.cam.hook(self.linear.register_forward_pre_hook, keep_pooled)

    def release(self):
        self.pooled = None

    def weights(self, A, logits):
        """What the head gives each channel of A [B, C, h, w] for the weights of its logits [N, classes]: [N, C, 1, 1].

        Raises ValueError where its input is not the mean of A over its grid, but for dropout. This is asked once, as
        the answer has to come back from the device.
        """
        if not self.checked and self.pooled is not None and self.pooled.shape == A.shape[:2]:
            kept = self.pooled != 0
            self.checked = close(self.pooled[kept], A.float().mean((2, 3))[kept], free_scale=True)
        if not self.checked:
            raise ValueError(f"cam needs a linear head on the global average of layer {self.cam.layer_name}; use "
                             "gradcam")
        with exact_float32():
            return (logits.to(self.linear.weight.dtype) @ self.linear.weight.detach())[:, :, None, None]


class Attention:
    """A transformer's attention through all blocks, which `rollout` and `gradrollout` follow.

    Raises ValueError for a network without blocks of one qkv layer each, and where a layer is named.
    """

    def __init__(self, cam, layer):
        self.cam, self.qkv, self.checked = cam, {}, False
        self.modules = [m for m in cam.model.modules() if getattr(m, "qkv", None) is not None
                        and all(hasattr(m, part) for part in ("proj", "num_heads", "scale"))]
        if not self.modules:
            raise ValueError(f"{cam.method} needs a transformer whose blocks have one qkv layer each; use gradcam")
        if layer is not None:
            raise ValueError(f"{cam.method} follows attention through all blocks: leave the layer out")

    def add_hooks(self):
        """Keep of each block its queries, keys and values, and what its attention mixed of them."""
        for position, module in enumerate(self.modules):
            def keep_qkv(module, args, output, position=position):
                self.qkv[position] = output

            def keep_mixed(module, args, position=position):
                self.cam.activations[position] = self.cam.with_gradient(args[0])
                return self.cam.activations[position], *args[1:]

            self.cam.hook(module.qkv.register_forward_hook, keep_qkv)
            self.cam.hook(getattr(module, "norm", module.proj).register_forward_pre_hook, keep_mixed)

    def release(self):
        self.qkv = {}

    def relevance(self, formula, gradients, rows):
        """Relevance [N, h, w] of each patch for what the head reads, of the images `rows`, int64 [N].

        formula: of `cam.ATTENTION`. gradients: a function that gives those of the tensors [B, T, C] that the blocks
        mixed, or None where the formula takes none. Raises ValueError where attention is over windows, or more than a
        softmax of q k^T.
        """
        cam, first = self.cam, self.cam.activations[0]
        every = first.dim() == 3 and first.shape[0] == cam.batch  # windows would come as more than one per image
        sides = cam.token_grid(first.shape[1] - cam.prefix) if every else None
        if sides is None or min(sides) < cam.min_grid:
            raise ValueError(f"{cam.method} needs attention over all of the image, at least {cam.min_grid}x"
                             f"{cam.min_grid} patches; use gradcam, or larger images")
        dtype = torch.promote_types(first.dtype, torch.float32)
        if len(rows) == 0:
            return torch.zeros(0, *sides, dtype=dtype, device=first.device)

        def taken(tensor):
            return tensor[rows].detach().to(dtype)

        called = len(self.qkv) == len(self.modules)  # else some blocks use their qkv layer's weights without calling it
        if called:
            A, V = zip(*(self.attend(module, taken(self.qkv[i])) for i, module in enumerate(self.modules)))
            mixed = [cam.activations[i] for i in range(len(A))]
            self.checked = self.checked or all(close((a @ v).transpose(1, 2).flatten(2), taken(o))
                                               for a, v, o in zip(A, V, mixed))  # once: the device is waited for
        if not (called and self.checked):
            raise ValueError(f"{cam.method} cannot read this network's attention, which is more than a softmax of q "
                             "k^T; use gradcam")
        G = gradients and gradients(mixed)
        if G:  # the output of a head is its probabilities times v, so that is how the gradient comes back to them
            G = [taken(g).unflatten(2, (v.shape[1], -1)).transpose(1, 2) @ v.transpose(2, 3) for g, v in zip(G, V)]
        found = formula(A, G)
        read = found[:, 0] if reads_class_token(cam) else found[:, cam.prefix:].mean(1)
        return read[:, cam.prefix:].unflatten(1, sides)

    @staticmethod
    def attend(module, qkv):
        """Attention probabilities [N, heads, T, T] and values [N, heads, T, d] of one block, from its q, k and v."""
        q, k, v = qkv.unflatten(2, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = (getattr(module, f"{name}_norm", torch.nn.Identity())(t) for name, t in (("q", q), ("k", k)))
        return (q * module.scale @ k.transpose(2, 3)).softmax(3), v


def close(found, expected, free_scale=False):
    """Whether two tensors agree to 1%, in norm; with `free_scale`, up to a factor."""
    found, expected = found.float(), expected.float()
    scale = (found * expected).sum() / (expected**2).sum().clamp_min(1e-30) if free_scale else 1.0
    return bool((found - scale * expected).norm() <= 1e-2 * found.norm())


def principal(maps):
    """Maps [N, C, h, w], each place a point in C dimensions, projected on their first principal component: [N, h, w].

    Up to a positive factor, by power iteration: `eigh` would want float64, and wait. The sign makes the value that is
    largest in size positive, as in Seg-Eigen-CAM (Chung and Ying 2025, equation 13).
    """
    if not len(maps):
        return maps[:, 0]
    points = maps.flatten(2) - maps.mean((2, 3))[..., None]
    points = F.normalize(points.flatten(1), torch.inf, eps=torch.finfo(maps.dtype).tiny).view_as(points)
    with exact_float32():  # TF32 would blur the little that tells two components apart
        sides = points if len(points[0]) < points.shape[2] else points.transpose(1, 2)  # the smaller one first
        power = gram = sides @ sides.transpose(1, 2)
        for _ in range(SQUARINGS):
            power = (unit := F.normalize(power.flatten(1)).view_as(power)) @ unit
        largest = power.diagonal(dim1=1, dim2=2).argmax(1)[:, None, None].expand(-1, len(power[0]), 1)
        vector = gram @ F.normalize(gram @ F.normalize(power.gather(2, largest), dim=1), dim=1)  # less rounding
        projection = (points.transpose(1, 2) @ vector if sides is points else vector)[..., 0]
    flip = torch.where(projection.amax(1) < -projection.amin(1), -1.0, 1.0)
    return (projection * flip[:, None]).view(len(maps), *maps.shape[2:])


@contextlib.contextmanager
def exact_float32():
    """Within it float32 is not rounded to TF32: what is reported does not depend on whether a GPU has that."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
