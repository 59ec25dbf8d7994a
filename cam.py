"""Heat: which pixels made the network say what it said. From the same forward pass that trains it, on the device.

    with CAM(model, method="gradcam++") as cam:         # layer=None: the rule below; or a module, or its name
        logits = model(images)                          # [B, classes]
        heat = cam(logits, rows=rows, classes=classes)  # [len(rows), h, w] in [0, 1]
    heat = upsample(heat, size)                         # [N, H, W] in [0, 1]

A hook keeps the explained layer's activations A; `torch.autograd.grad` of a class's logit with respect to A walks back
through what lies behind that layer only, and the formula is a few sums over A's grid. The model's mode, parameters and
gradients are not touched, and nothing outlives the `with` block.

To add a method, write a function of (activations, gradients) and add it to `METHODS`.
"""

import math
import weakref

import torch
import torch.nn.functional as F

MIN_GRID = 4  # a coarser grid than 4 x 4 says too little about where
HALF_SCALE = 2.0**10  # float16 gradients of a logit are near the smallest it can hold: scaled up before, down after


# --- methods: (A, G) -> map before the ReLU ------------------------------------------------------------------------
# A: activations [N, C, h, w]. G: gradient of the explained logit with respect to A, same shape. Both float32 or float64.


def cam(A, G):
    """CAM, Zhou et al. 2016, equation 2: M = sum_k w_k A_k, with w the class's row of the linear head.

    G holds w as [N, C, 1, 1]. For networks that end in global average pooling and a linear layer; no gradient is taken.
    """
    return (G * A).sum(1)


def gradcam(A, G):
    """Grad-CAM, Selvaraju et al. 2017, equations 1 and 2: each channel weighs its gradient's spatial mean."""
    return (G.mean((2, 3), keepdim=True) * A).sum(1)


def gradcam_plus_plus(A, G):
    """Grad-CAM++, Chattopadhay et al. 2018, equations 11 and 19.

    With Y = exp(S), as the paper has it, equation 19 becomes alpha = G^2 / (2 G^2 + sum(A) G^3), and a channel weighs
    sum(alpha relu(G)). The constant 1e-6 is not in the paper but in the grad-cam library, and so in most published
    figures. It keeps the quotient finite where activations are negative (a ViT's norm), and matters: logits' gradients
    are often around 1e-3, so that it moved the map of an untrained resnet18 by up to 0.06 and of an EfficientNet by
    up to 0.015.
    """
    squared = G**2
    denominator = 2 * squared + A.sum((2, 3), keepdim=True) * squared * G + 1e-6
    alpha = torch.where(G != 0, squared / denominator, 0.0)
    return ((alpha * G.relu()).sum((2, 3), keepdim=True) * A).sum(1)


METHODS = {"cam": cam, "gradcam": gradcam, "gradcam++": gradcam_plus_plus}


# --- from maps to heat ---------------------------------------------------------------------------------------------


def rescale(maps):
    """Maps [N, h, w] shifted and scaled per image to [0, 1]; a map without contrast, or not finite, becomes 0."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return torch.nan_to_num((maps - low) / (high - low), nan=0.0, posinf=0.0, neginf=0.0)


def upsample(heat, size):
    """Heat [N, h, w] at image size [N, H, W], bilinear, rescaled to [0, 1] per image. size: H = W, or (H, W)."""
    if heat.numel() == 0:
        height, width = (size, size) if isinstance(size, int) else size
        return heat.new_zeros(len(heat), height, width)
    return rescale(F.interpolate(heat[:, None], size=size, mode="bilinear", align_corners=False)[:, 0])


class CAM:
    """Heat from the forward passes made inside the `with` block. The same object may be entered again and again.

    model: a timm network, or any nn.Module with `layer` given. method: a key of `METHODS`.
    layer: a module of `model`, its name, or None. The rule for None: the deepest layer that keeps at least a 4 x 4 grid,
      among the stages that timm names (`feature_info`) and what follows the last of them. Where a class token alone
      is read out, the last block's output has no gradient at the patches; there it is that block's first norm.
      The choice is made at the first forward pass and then kept, as `layer_name`.
    Raises ValueError, naming what would serve, for an unknown method or layer and where no layer or method fits.
    """

    def __init__(self, model, method="gradcam", layer=None):
        if method not in METHODS:
            raise ValueError(f"unknown CAM method {method!r}; there are {', '.join(METHODS)}")
        model = getattr(model, "module", model)  # DistributedDataParallel
        self.model = getattr(model, "_orig_mod", model)  # torch.compile
        self.method = method
        names = {module: name for name, module in self.model.named_modules()}
        if isinstance(layer, str):
            if layer not in names.values():
                raise ValueError(f"no layer {layer!r} in this network; its parts are "
                                 f"{', '.join(name for name, _ in self.model.named_children())}")
            layer = self.model.get_submodule(layer)
        elif layer is not None and layer not in names:
            raise ValueError("the layer is not a module of this network")
        self.layer, self.layer_name = layer, names.get(layer)
        self._stages = [info["module"] for info in getattr(self.model, "feature_info", [])]
        if layer is None and not self._stages:
            raise ValueError("this network does not say what its stages are: name the layer to explain, one of "
                             f"{', '.join(name for name in names.values() if name)}")
        self._prefix = getattr(self.model, "num_prefix_tokens", 0)
        self._linear, self._checked = self._classifier() if method == "cam" else None, False
        self._hooks = []
        self.release()

    def __enter__(self):
        if self._hooks:
            raise RuntimeError("this CAM's block has been entered already")
        self._hooks.append(self.model.register_forward_pre_hook(self._before, with_kwargs=True))
        if self.layer is not None:
            self._hooks.append(self.layer.register_forward_hook(self._keep))
        else:
            self._hooks += [module.register_forward_hook(lambda m, i, output, name=name: self._see(name, output))
                            for name, module in self.model.named_modules() if name]
        if self._linear is not None:
            self._hooks.append(self._linear.register_forward_pre_hook(self._keep_pooled))
        if self.layer is None:
            self._hooks.append(self.model.register_forward_hook(lambda *_: self._choose()))
        return self

    def __exit__(self, *exception):
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.release()

    def release(self):
        """Forget the last forward pass."""
        self._seen, self._activations, self._pooled, self._logits = [], None, None, None

    # hooks, in the order in which a forward pass calls them

    def _before(self, module, args, kwargs):
        self.release()
        images = args[0] if args else next(iter(kwargs.values()))
        self._batch, self._height, self._width = len(images), *images.shape[-2:]

    def _keep(self, module, args, output):
        if not isinstance(output, torch.Tensor):
            raise ValueError(f"layer {self.layer_name} gives {type(output).__name__}, not one tensor: name another")
        output = _with_gradient(output)
        self._activations = output
        return output

    def _see(self, name, output):
        if isinstance(output, torch.Tensor) and output.is_floating_point() and output.dim() > 2:
            output = _with_gradient(output)
            self._seen.append((name, output))
            return output

    def _keep_pooled(self, module, args):
        self._pooled = args[0].detach()

    def _choose(self):
        """Fix the explained layer, from the names and outputs that the first forward pass went through."""
        candidates = self._candidates([name for name, _ in self._seen])
        grids = [(name, output, *self.grid(output).shape[-2:]) for name, output in self._seen
                 if name in candidates and self.grid(output) is not None]
        fine = [g for g in grids if min(g[2:]) >= MIN_GRID]
        if not fine:
            sizes = ", ".join(dict.fromkeys(f"{name} {h}x{w}" for name, _, h, w in grids)) or "none"
            raise ValueError(f"no layer keeps a {MIN_GRID}x{MIN_GRID} grid for images of {self._height}x{self._width} "
                             f"(grids: {sizes}): use larger images, or name a layer")
        deepest = fine[-1][1]
        # Several modules may give this very tensor: an identity, a container. The stage, or else the outermost, names it.
        same = [name for name, output, *_ in fine if output is deepest]
        self.layer_name = min(same, key=lambda name: (name not in self._stages, name.count(".")))
        self.layer, self._activations, self._seen = self.model.get_submodule(self.layer_name), deepest, []
        for hook in self._hooks[1:]:  # the first stays: it is `_before`
            hook.remove()
        self._hooks = self._hooks[:1] + [self.layer.register_forward_hook(self._keep)]
        if self._linear is not None:
            self._hooks.append(self._linear.register_forward_pre_hook(self._keep_pooled))

    def _candidates(self, order):
        """Names that the rule allows, given all names in order of execution."""
        stages = [name for name in order if name in self._stages]
        if not stages:
            raise ValueError("none of the stages that this network names was run: name the layer to explain")
        if self._prefix and getattr(self.model, "global_pool", "token") in ("token", ""):
            inside = [name for name in order if name.startswith(stages[-1] + ".")]
            return set(inside[:1])
        return {*stages, *order[order.index(stages[-1]):]}

    def grid(self, tensor):
        """Output of a layer as [B, C, h, w], or None where it is not a map of the image.

        Tokens [B, N, C] lose the prefix tokens; [B, h, w, C] is told from [B, C, h, w] by the image's proportions.
        """
        if len(tensor) != self._batch:
            return None
        ratio = self._height / self._width
        if tensor.dim() == 3:
            tokens = tensor[:, self._prefix:]
            h = round(math.sqrt(tokens.shape[1] * ratio))
            w = tokens.shape[1] // h if h else 0
            if h * w == 0 or h * w != tokens.shape[1] or abs(h / ratio - w) > 1:
                return None
            return tokens.transpose(1, 2).unflatten(2, (h, w))
        if tensor.dim() != 4:
            return None
        first, last = (abs(h / ratio - w) <= 1 for h, w in (tensor.shape[2:], tensor.shape[1:3]))
        if last and (not first or getattr(self.model, "output_fmt", "NCHW") == "NHWC"):
            return tensor.permute(0, 3, 1, 2)
        return tensor if first else None

    # the heat

    @torch.no_grad()
    def __call__(self, logits, rows=None, classes=None):
        """Heat for some images of the last forward pass.

        logits: [B, classes], the model's output for that pass. rows: int64 [N] images to explain, all by default; none is
          fine. classes: class to explain for each, int64 [N] or one int; the predicted one by default.
        Returns [N, h, w] in [0, 1] on the logits' device, float32 (float64 for a float64 model), with no graph attached.
        """
        if self._activations is None:
            raise RuntimeError("no forward pass to explain: call the model inside the `with` block first")
        if self._logits is None or self._logits() is not logits:
            # What was kept for these logits goes when they go, and not only at the next forward pass.
            kept = self._activations
            self._logits = weakref.ref(logits, lambda _: self.release() if self._activations is kept else None)
        rows = torch.arange(len(logits)) if rows is None else torch.as_tensor(rows)
        rows = (rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows.long()).to(logits.device)
        if classes is None:
            classes = logits.detach()[rows].argmax(1)
        classes = torch.as_tensor(classes, device=logits.device).expand(len(rows))

        A = self.grid(self._activations)
        if A is None:
            raise ValueError(f"layer {self.layer_name} gives {list(self._activations.shape)}, not a map of images of "
                             f"{self._height}x{self._width}: name another")
        dtype = torch.float64 if A.dtype == torch.float64 else torch.float32
        if self.method == "cam":
            self._check_head(A)
        if len(rows) == 0:
            return torch.zeros(0, *A.shape[-2:], dtype=dtype, device=A.device)
        with torch.autocast(A.device.type, enabled=False):
            if self.method == "cam":
                G = self._linear.weight.detach()[classes][:, :, None, None].to(dtype)
            else:
                G = self._gradients(logits, rows, classes, dtype)
            return rescale(METHODS[self.method](A[rows].to(dtype), G).relu())

    def _gradients(self, logits, rows, classes, dtype):
        if not (logits.requires_grad and self._activations.requires_grad):
            raise ValueError(f"{self.method} needs gradients: run the forward pass outside torch.no_grad() and "
                             "inference_mode(), and explain a layer that the logits depend on")
        scale = HALF_SCALE if logits.dtype == torch.float16 else 1.0
        of_logits = torch.zeros_like(logits).index_put_((rows, classes), torch.full_like(logits[rows, 0], scale))
        gradients, = torch.autograd.grad(logits, self._activations, of_logits, retain_graph=True)
        return self.grid(gradients)[rows].to(dtype) / scale

    def _classifier(self):
        """The linear head, for `cam`."""
        head = self.model.get_classifier() if hasattr(self.model, "get_classifier") else None
        head = head or next((m for m in reversed(list(self.model.modules())) if isinstance(m, torch.nn.Linear)), None)
        if not isinstance(head, torch.nn.Linear):
            raise ValueError("cam needs a network that ends in global average pooling and one linear layer; use "
                             f"{' or '.join(m for m in METHODS if m != 'cam')}")
        return head

    def _check_head(self, A):
        if not self._checked:  # once, as it waits for the device
            self._checked = self._pooled is not None and _is_average(self._pooled, A.detach())
        if not self._checked:
            raise ValueError(f"cam needs a linear head on the global average of layer {self.layer_name}; use "
                             f"{' or '.join(m for m in METHODS if m != 'cam')}")


def _with_gradient(output):
    """`output`, or where nothing before it is trained, a copy that autograd can ask about."""
    if torch.is_grad_enabled() and not output.requires_grad and not output.is_inference():
        # cloned, for a layer behind it may work in place, which autograd forbids on a leaf
        return output.detach().requires_grad_().clone()
    return output


def _is_average(pooled, A):
    """Whether `pooled` [B, C] is the mean of A [B, C, h, w] over its grid, but for dropout's zeros and scale."""
    means = A.float().mean((2, 3))
    if pooled.shape != means.shape:
        return False
    kept = pooled != 0
    pooled, means = pooled.float()[kept], means[kept]
    scale = (pooled * means).sum() / (means * means).sum().clamp_min(1e-30)
    error = (pooled - scale * means).norm() / pooled.norm().clamp_min(1e-30)
    return bool(error < 1e-2)
