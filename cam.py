"""Heat: which pixels made the network say what it said. From the same forward pass that trains it, on the device.

    with CAM(model, method="gradcam++") as cam:         # layer=None: the rule below; or "-2", a module, its name, or several
        logits = model(images)                          # [B, classes]
        heat = cam(logits, rows=rows, classes=classes)  # [len(rows), h, w] in [0, 1]
    heat = upsample(heat, size)                         # [N, H, W] in [0, 1]

A hook keeps the explained layer's activations A; `torch.autograd.grad` of a class's logit with respect to A walks back
through what lies behind that layer only, and the formula is a few sums over A's grid. The model's mode, parameters and
gradients are not touched, and nothing outlives the `with` block.

To add a method, write a function of (activations, gradients) and put it into `WEIGHTS`, `ATTENTION` or `CONTROLS`.
"""

import math
import re
import weakref

import torch
import torch.nn.functional as F

MIN_GRID = 4  # a coarser grid than 4 x 4 says too little about where
FROM_END = re.compile(r"-[1-9]\d*", re.ASCII)  # in the place of a layer's name: -1 is the last stage, -2 the one before
FINE_STEP = 2.0**15  # float16 gradients of a logit may lie below the smallest it can hold: taken at this scale as well

# --- methods that weigh activations: (A, G) -> weights, where heat is the channel sum of weights times A -------------
# A: activations [N, C, h, w]. G: gradient of the explained score with respect to A, same shape. Both float32 or float64.
# Weights: anything that broadcasts to A.


def cam(A, G):
    """CAM, Zhou et al. 2016, equation 2: a channel weighs what the linear head gives it.

    G holds the head's row as [N, C, 1, 1]. For networks that end in global average pooling and a linear layer; no gradient
    is taken.
    """
    return G


def gradcam(A, G):
    """Grad-CAM, Selvaraju et al. 2017, equation 1: a channel weighs its gradient's spatial mean."""
    return G.mean((2, 3), keepdim=True)


def gradcam_plus_plus(A, G):
    """Grad-CAM++, Chattopadhay et al. 2018, equations 11 and 19.

    With Y = exp(S), as the paper has it, equation 19 becomes alpha = G^2 / (2 G^2 + sum(A) G^3), and a channel weighs
    sum(alpha relu(G)). The constant 1e-6 is not in the paper but in the grad-cam library, and so in most published
    figures. It keeps the quotient finite where activations are negative (a ViT's norm), and matters: logits' gradients
    are often around 1e-3, so that it moved the map of an untrained resnet18 by up to 0.06 and of an EfficientNet by
    up to 0.015.
    """
    g = G.relu()  # what is not positive weighs nothing, whatever its alpha
    # alpha g = g / (2 + sum(A) g + 1e-6 / g^2), in place where it can be, as fresh memory costs more than the arithmetic
    denominator = g.square().reciprocal_().mul_(1e-6).add_(2).addcmul_(A.sum((2, 3), keepdim=True), g)
    return g.div_(denominator).sum((2, 3), keepdim=True)


def xgradcam(A, G):
    """XGrad-CAM, Fu et al. 2020, equation 8: the gradient's mean, weighted by the channel's own activations.

    The constant 1e-7 keeps channels that are silent everywhere finite; it is the grad-cam library's.
    """
    return (G * A / (A.sum((2, 3), keepdim=True) + 1e-7)).sum((2, 3), keepdim=True)


def hirescam(A, G):
    """HiResCAM, Draelos and Carin 2020, equation 5: every place weighs its own gradient."""
    return G


def layercam(A, G):
    """LayerCAM, Jiang et al. 2021, equations 5 and 6: every place weighs its own gradient where that is positive."""
    return G.relu()


def elementwise(A, G):
    """HiResCAM with each product G A cut off below zero before the sum, as the grad-cam library's GradCAMElementWise."""
    return torch.where(G * A > 0, G, 0.0)


def eigencam(A, G):
    """Eigen-CAM, Muhammad and Yeasin 2020: the first principal component of the activations, whatever the class."""
    return torch.ones_like(A[:, :1, :1, :1])


def eigengradcam(A, G):
    """Eigen-CAM of the activations times their gradients, as the grad-cam library's EigenGradCAM: it depends on the class."""
    return G


WEIGHTS = {"cam": cam, "gradcam": gradcam, "gradcam++": gradcam_plus_plus, "xgradcam": xgradcam, "hirescam": hirescam,
           "layercam": layercam, "elementwise": elementwise, "eigencam": eigencam, "eigengradcam": eigengradcam}
EIGEN = {"eigencam", "eigengradcam"}  # project on the first principal component instead of summing over channels


def principal(maps):
    """Maps [N, C, h, w], each place a point in C dimensions, projected on their first principal component: [N, h, w].

    Found as the top eigenvector of the hw x hw Gram matrix, which is small whatever C is. Its sign is arbitrary; here the
    largest value in size is positive, as in Seg-Eigen-CAM (Chung and Ying 2025, equation 13).
    """
    points = maps.flatten(2).double()
    points = points - points.mean(2, keepdim=True)
    values, vectors = torch.linalg.eigh(points.transpose(1, 2) @ points)
    projection = vectors[..., -1] * values[:, -1:].clamp_min(0).sqrt()
    flip = torch.where(projection.amax(1) < -projection.amin(1), -1.0, 1.0)
    return (projection * flip[:, None]).to(maps.dtype).view(len(maps), *maps.shape[2:])


# --- methods that follow attention through the blocks: (A, G) -> relevance [N, T, T] of each token for each ----------
# A: list of attention probabilities [N, heads, T, T], first block first. G: the score's gradient with respect to each.


def rollout(A, G):
    """Attention rollout, Abnar and Zuidema 2020, section 3: heads averaged, half of each token kept, blocks multiplied."""
    relevance = identity = torch.eye(A[0].shape[-1], dtype=A[0].dtype, device=A[0].device)
    for attention in A:
        relevance = (attention.mean(1) + identity) / 2 @ relevance
    return relevance


def gradrollout(A, G):
    """Generic attention explainability, Chefer et al. 2021 (ICCV), equations 5 and 6, for self-attention.

    R starts as the identity and gains mean_heads(relu(G A)) R in each block. (Their CVPR 2021 paper propagates relevance through
    every layer instead, and needs rules for each.)
    """
    relevance = torch.eye(A[0].shape[-1], dtype=A[0].dtype, device=A[0].device).expand(len(A[0]), -1, -1)
    for attention, gradient in zip(A, G):
        relevance = relevance + (gradient * attention).relu().mean(1) @ relevance
    return relevance


ATTENTION = {"rollout": rollout, "gradrollout": gradrollout}

# --- controls: they look at nothing but the grid of A ---------------------------------------------------------------


def random(A, G):
    """A smooth random field, new for every image: 4 x 4 normal values, bilinear in between."""
    field = torch.randn(len(A), 1, MIN_GRID, MIN_GRID).to(A.device, A.dtype)
    return _interpolate(field[:, 0], A.shape[2:]) + 10  # so that the ReLU behind every method keeps all of it


def center(A, G):
    """A centred Gaussian with a standard deviation of a quarter of the side: where photographers put things."""
    down, across = (((torch.arange(n, device=A.device, dtype=A.dtype) + 0.5) / n - 0.5) / 0.25 for n in A.shape[2:])
    return torch.exp(-0.5 * (down[:, None] ** 2 + across**2)).expand(len(A), -1, -1)


CONTROLS = {"random": random, "center": center}
METHODS = {**WEIGHTS, **ATTENTION, **CONTROLS}
NO_GRADIENT = {"cam", "eigencam", "rollout", *CONTROLS}


# --- which score is explained: (logits [N, classes], labels [N]) -> class [N], and class [N] that counts against it ---


def best_other(logits, classes):
    """The class with the highest logit apart from `classes`, int64 [N]."""
    return logits.detach().scatter(1, classes[:, None], -torch.inf).argmax(1)


EXPLAIN = {"predicted": lambda logits, labels: (logits.detach().argmax(1), None),
           "true": lambda logits, labels: (labels, None),
           "margin": lambda logits, labels: (labels, best_other(logits, labels))}

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
    return rescale(_interpolate(heat, size))


def _interpolate(maps, size):
    return F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


class CAM:
    """Heat from the forward passes made inside the `with` block. The same object may be entered again and again.

    model: a timm network, or any nn.Module with `layer` given. method: a key of `METHODS`.
    layer: a module of `model`, its name, or None; or several, as a list or as names with commas between: then the heat is their
      average at image size. The rule for None: the deepest layer that keeps at least a 4 x 4 grid, among the stages that timm
      names (`feature_info`) and what follows the last of them; "-2" is the stage before the last, whatever its grid. Where a class token
      alone is read out, the last block's output has no gradient at the patches; there it is that block's first norm. The choice is
      made at the first forward pass and then kept, as `layer_name`.
    smooth: eigen-smoothing, Muhammad and Yeasin 2020: the first principal component of the weighted activations instead of their sum.
    Raises ValueError, naming what would serve, for an unknown method or layer and where no layer or method fits.

    compiled: whether the model will be compiled; one that is compiled already says so itself.

    Under `torch.compile`, make the CAM before the compiled model is called for the first time: it tells the compiler to look at
    hooks and to let the graph be walked twice. Each hook breaks the compiled graph in two; `bench.py compile` says what that costs.
    """

    def __init__(self, model, method="gradcam", layer=None, smooth=False, compiled=False):
        if method not in METHODS:
            raise ValueError(f"unknown CAM method {method!r}; there are {', '.join(METHODS)}")
        if smooth and method not in WEIGHTS:
            raise ValueError(f"{method} has no channels to smooth over; smooth one of {', '.join(WEIGHTS)}")
        wrappers = [model]
        while inside := getattr(wrappers[-1], "_orig_mod", None) or _parallel(wrappers[-1]):
            wrappers.append(inside)
        self.model = wrappers[-1]
        self._compiled = compiled or any(hasattr(w, "_orig_mod") or getattr(w, "_compiled_call_impl", None) for w in wrappers)
        if self._compiled:
            torch._dynamo.config.skip_nnmodule_hook_guards = False
            torch._functorch.config.donated_buffer = False
        self.method, self.smooth = method, smooth
        self._names = {module: name for name, module in self.model.named_modules()}
        self._stages = [info["module"] for info in getattr(self.model, "feature_info", [])]
        self._prefix = getattr(self.model, "num_prefix_tokens", 0)
        self._checked = False  # whether head or attention were seen to be what the method takes them for
        self._linear = self._classifier() if method == "cam" else None
        self._attentions = self._attention_modules(layer) if method in ATTENTION else []
        self._stage = int(layer) if isinstance(layer, str) and FROM_END.fullmatch(layer) else None
        self.layers = [] if layer is None or self._stage else self._find(layer)
        if not (self.layers or self._stages or self._attentions):
            raise ValueError("this network does not say what its stages are: name the layer to explain, one of "
                             f"{', '.join(name for name in self._names.values() if name)}")
        self._hooks = []
        self.release()

    @property
    def layer_name(self):
        """Name of the explained layer; several with commas between; None before the rule has chosen, or for attention."""
        return ",".join(self._names[layer] for layer in self.layers) or None

    def _find(self, layer):
        """The modules that `layer` names."""
        several = layer.split(",") if isinstance(layer, str) else layer if isinstance(layer, (list, tuple)) else [layer]
        by_name, found = {name: module for module, name in self._names.items()}, []
        for one in several:
            module = by_name.get(one.strip()) if isinstance(one, str) else one
            if module not in self._names:
                what = f"no layer {one!r} in this network" if isinstance(one, str) else "a layer is not of this network"
                raise ValueError(f"{what}; its parts are {', '.join(name for name, _ in self.model.named_children())}")
            found.append(module)
        return found

    # hooks, and what they keep

    def __enter__(self):
        if self._hooks:
            raise RuntimeError("this CAM's block has been entered already")
        self._hooks.append(self.model.register_forward_pre_hook(self._outside_graph(self._before), with_kwargs=True))
        if self._linear is not None:
            self._hooks.append(self._linear.register_forward_pre_hook(self._outside_graph(self._keep_pooled)))
        if self._attentions:
            self._hook_attention()
        elif self.layers:
            self._hook_layers()
        else:
            for name, module in self.model.named_modules():
                if name:
                    self._hooks.append(module.register_forward_hook(lambda m, i, out, name=name: self._see(name, out)))
            self._hooks.append(self.model.register_forward_hook(lambda *_: self._choose()))
        return self

    def _hook_layers(self):
        for position, layer in enumerate(self.layers):
            def keep(module, args, output, position=position):
                output = self._activations[position] = _with_gradient(output)
                return output

            self._hooks.append(layer.register_forward_hook(self._outside_graph(keep)))

    def _hook_attention(self):
        for position, module in enumerate(self._attentions):
            def keep_qkv(module, args, output, position=position):
                self._qkv[position] = output

            def keep_mixed(module, args, position=position):
                self._activations[position] = _with_gradient(args[0])
                return self._activations[position], *args[1:]

            self._hooks.append(module.qkv.register_forward_hook(self._outside_graph(keep_qkv)))
            mixed = getattr(module, "norm", module.proj)
            self._hooks.append(mixed.register_forward_pre_hook(self._outside_graph(keep_mixed)))

    def _outside_graph(self, hook):
        """`hook`, run between compiled graphs: within one, A would be an output that autograd sees no way to from the logits."""
        return torch.compiler.disable(hook) if self._compiled else hook

    def __exit__(self, *exception):
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.release()

    def release(self):
        """Forget the last forward pass."""
        self._seen, self._activations, self._qkv, self._pooled, self._logits = [], {}, {}, None, None

    def _before(self, module, args, kwargs):
        self.release()
        images = args[0] if args else next(iter(kwargs.values()))
        self._batch, self._height, self._width = images.shape[0], images.shape[-2], images.shape[-1]

    def _see(self, name, output):
        if isinstance(output, torch.Tensor) and output.is_floating_point() and output.dim() > 2:
            output = _with_gradient(output)
            self._seen.append((name, output))
            return output

    def _keep_pooled(self, module, args):
        self._pooled = args[0].detach()

    # which layer

    def _choose(self):
        """Fix the explained layer, from the names and outputs that the first forward pass went through."""
        candidates = self._candidates([name for name, _ in self._seen])
        grids = [(name, output, *self.grid(output).shape[-2:]) for name, output in self._seen
                 if name in candidates and self.grid(output) is not None]
        fine = [g for g in grids if self._stage or min(g[2:]) >= MIN_GRID]
        if not fine:
            sizes = ", ".join(dict.fromkeys(f"{name} {h}x{w}" for name, _, h, w in grids)) or "none"
            raise ValueError(f"no layer keeps a {MIN_GRID}x{MIN_GRID} grid for images of {self._height}x{self._width} "
                             f"(grids: {sizes}): use larger images, or name a layer")
        deepest = fine[-1][1]
        # Several modules may give this very tensor: an identity, a container. The stage, or else the outermost, names it.
        same = [name for name, output, *_ in fine if output is deepest]
        name = min(same, key=lambda name: (name not in self._stages, name.count(".")))
        self.layers, self._activations, self._seen = [self.model.get_submodule(name)], {0: deepest}, []
        stay = 1 if self._linear is None else 2  # `_before` and `_keep_pooled`
        for hook in self._hooks[stay:]:
            hook.remove()
        self._hooks = self._hooks[:stay]
        self._hook_layers()

    def _candidates(self, order):
        """Names that the rule allows, given all names in order of execution."""
        stages = [name for name in order if name in self._stages]
        if not stages:
            serve = dict.fromkeys(name for name, output in self._seen if self.grid(output) is not None
                                  and min(self.grid(output).shape[-2:]) >= MIN_GRID and name.count(".") < 4)
            raise ValueError("this network does not give its stages as one tensor each: name the layer to explain, as "
                             f"{' or '.join(list(serve)[-4:]) or 'none that keeps a grid'}")
        if self._stage and -self._stage > len(stages):
            raise ValueError(f"this network has no layer {self._stage}: it has {len(stages)} stages, {', '.join(stages)}")
        if self._reads_class_token():
            inside = [name for name in order if name.startswith(stages[self._stage or -1] + ".")]
            return set(inside[:1])
        if self._stage:
            return {stages[self._stage]}
        # What follows the last stage counts where it is a part of the network's own, as a last norm or convolution.
        return {*stages, *(name for name in order[order.index(stages[-1]):] if "." not in name)}

    def _reads_class_token(self):
        """Whether the head sees a class token alone, and no patch."""
        return self._prefix > 0 and getattr(self.model, "global_pool", "token") in ("token", "")

    def grid(self, tensor):
        """Output of a layer as [B, C, h, w], or None where it is not a map of the image.

        Tokens [B, T, C] lose the prefix tokens; [B, h, w, C] is told from [B, C, h, w] by the image's proportions.
        """
        if tensor.shape[0] != self._batch:
            return None
        if tensor.dim() == 3:
            for prefix in (self._prefix, 0):  # some networks add their class token in later blocks
                sides = self._token_grid(tensor.shape[1] - prefix)
                if sides:
                    return tensor[:, prefix:].transpose(1, 2).unflatten(2, sides)
            return None
        if tensor.dim() != 4:
            return None
        first, last = (abs(h * self._width / self._height - w) <= 1 for h, w in (tensor.shape[2:], tensor.shape[1:3]))
        if last and (not first or getattr(self.model, "output_fmt", "NCHW") == "NHWC"):
            return tensor.permute(0, 3, 1, 2)
        return tensor if first else None

    def _token_grid(self, count):
        """(h, w) of a grid of `count` tokens in the image's proportions, or None."""
        h = round(math.sqrt(max(count, 0) * self._height / self._width))
        if h == 0 or count % h or abs(h * self._width / self._height - count // h) > 1:
            return None
        return h, count // h

    # the heat

    @torch.no_grad()
    def __call__(self, logits, rows=None, classes=None, against=None):
        """Heat for some images of the last forward pass.

        logits: [B, classes], the model's output for that pass. rows: int64 [N] images to explain, all by default; none is
          fine. classes: class to explain for each, int64 [N] or one int; the predicted one by default. against: a class for
          each, or one, whose logit is subtracted, so that the margin between the two is explained.
        Returns [N, h, w] in [0, 1] on the logits' device, float32 (float64 for a float64 model), with no graph attached.
        """
        if not self._activations:
            raise RuntimeError("no forward pass to explain: call the model inside the `with` block first"
                               + (", and a compiled one not before the CAM is made" if self._compiled else ""))
        if self._logits is None or self._logits() is not logits:
            # What was kept for these logits goes when they go, and not only at the next forward pass.
            kept = self._activations
            self._logits = weakref.ref(logits, lambda _: self.release() if self._activations is kept else None)
        if rows is not None:
            rows = torch.as_tensor(rows, device=logits.device)
            rows = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows.long()
        count = len(logits) if rows is None else len(rows)
        if classes is None:
            classes = _pick(logits.detach(), rows).argmax(1)
        classes, against = (None if c is None else torch.as_tensor(c, device=logits.device).expand(count)
                            for c in (classes, against))
        score = rows, classes, against
        with torch.autocast(logits.device.type, enabled=False):
            if self.method in ATTENTION:
                return self._from_attention(logits, *score)
            gradients = {}
            if self.method not in NO_GRADIENT and count:
                gradients = self._gradients(logits, list(self._activations.values()), *score)
                gradients = dict(zip(self._activations, gradients))
            heats = [self._from_layer(position, gradients.get(position), *score) for position in sorted(self._activations)]
        if len(heats) == 1:
            return heats[0]
        if count == 0:
            return upsample(heats[0], (self._height, self._width))
        return rescale(sum(_interpolate(heat, (self._height, self._width)) for heat in heats))

    def _from_layer(self, position, gradient, rows, classes, against):
        A = self._activations[position]
        A = self.grid(A) if isinstance(A, torch.Tensor) else None
        name = self._names[self.layers[position]]
        if A is None:
            raise ValueError(f"layer {name} gives no map of images of {self._height}x{self._width}: name another")
        if self.method == "cam":
            self._check(_is_average(self._pooled, A), f"cam needs a linear head on the global average of layer {name}")
        A = _pick(A, rows).to(_at_least_float32(A))
        if len(A) == 0:
            return A.new_zeros(0, *A.shape[2:])
        if self.method in CONTROLS:
            return rescale(CONTROLS[self.method](A, None).relu())
        G = None if gradient is None else _pick(self.grid(gradient), rows)
        if self.method == "cam":
            head = self._linear.weight.detach()
            G = (head[classes] - (0 if against is None else head[against]))[:, :, None, None].to(A.dtype)
        weighted = WEIGHTS[self.method](A, G) * A
        return rescale((principal(weighted) if self.smooth or self.method in EIGEN else weighted.sum(1)).relu())

    def _from_attention(self, logits, rows, classes, against):
        first = self._activations[0]
        whole = first.dim() == 3 and first.shape[0] == self._batch  # windows would come as more than one per image
        sides = self._token_grid(first.shape[1] - self._prefix) if whole else None
        if sides is None or min(sides) < MIN_GRID:
            raise ValueError(f"{self.method} needs attention over the whole image, at least {MIN_GRID}x{MIN_GRID} patches; use "
                             "gradcam, or larger images")
        dtype = _at_least_float32(first)
        if len(classes) == 0:
            return torch.zeros(0, *sides, dtype=dtype, device=logits.device)
        unread = f"{self.method} cannot read this network's attention, which is more than a softmax of q k^T"
        if len(self._qkv) < len(self._attentions):  # some blocks use their qkv layer's weights without calling it
            self._check(False, unread)
        A, V = zip(*(self._attend(module, _pick(self._qkv[i].detach(), rows).to(dtype)) for i, module in enumerate(self._attentions)))
        mixed = [_pick(self._activations[i].detach(), rows).to(dtype) for i in range(len(A))]
        self._check(lambda: all(_close((a @ v).transpose(1, 2).flatten(2), o) for a, v, o in zip(A, V, mixed)), unread)
        G = None
        if self.method not in NO_GRADIENT:
            of_mixed = self._gradients(logits, [self._activations[i] for i in range(len(A))], rows, classes, against)
            # The output of a head is its probabilities times v, so that is how the gradient comes back to them.
            G = [_pick(g, rows).unflatten(2, (v.shape[1], -1)).transpose(1, 2) @ v.transpose(2, 3) for g, v in zip(of_mixed, V)]
        relevance = ATTENTION[self.method](A, G)
        read = relevance[:, 0] if self._reads_class_token() else relevance[:, self._prefix:].mean(1)
        return rescale(read[:, self._prefix:].unflatten(1, sides))

    def _attend(self, module, qkv):
        """Attention probabilities [N, heads, T, T] and values [N, heads, T, d] of one block, from its q, k and v."""
        q, k, v = qkv.unflatten(2, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = (getattr(module, f"{name}_norm", torch.nn.Identity())(t) for name, t in (("q", q), ("k", k)))
        return (q * module.scale @ k.transpose(2, 3)).softmax(3), v

    def _gradients(self, logits, tensors, rows, classes, against):
        """The score's gradient with respect to each tensor, all rows of the batch, float32 or float64."""
        if not (logits.requires_grad and all(isinstance(t, torch.Tensor) and t.requires_grad for t in tensors)):
            raise ValueError(f"{self.method} needs gradients: run the forward pass outside torch.no_grad() and "
                             "inference_mode(), and explain a layer that the logits depend on")
        rows = torch.arange(len(logits), device=logits.device) if rows is None else rows
        of_logits = torch.zeros_like(logits)
        of_logits[rows, classes] = 1
        if against is not None:
            of_logits[rows, against] = torch.where(against == classes, 0, -1).to(logits.dtype)

        def take(scale):
            taken = torch.autograd.grad(logits, tensors, of_logits * scale, retain_graph=True)
            return [gradient.to(_at_least_float32(gradient)) for gradient in taken]

        gradients = take(1)
        if logits.dtype == torch.float16:
            # float16 spans 2^-24 to 2^16. Taken twice, so that neither small nor large gradients are lost.
            gradients = [torch.where(fine.isfinite().flatten(1).all(1).view(-1, *[1] * (fine.dim() - 1)), fine / FINE_STEP, g)
                         for g, fine in zip(gradients, take(FINE_STEP))]
        return gradients

    # what a method needs of the network

    def _check(self, fits, problem):
        """Once, as the answer has to come back from the device."""
        self._checked = self._checked or bool(fits() if callable(fits) else fits)
        if not self._checked:
            others = [m for m in METHODS if m not in CONTROLS and m not in ATTENTION and m != "cam"]
            raise ValueError(f"{problem}; use {' or '.join(others)}")

    def _classifier(self):
        """The linear head, for `cam`."""
        head = self.model.get_classifier() if hasattr(self.model, "get_classifier") else None
        head = head or next((m for m in reversed(list(self.model.modules())) if isinstance(m, torch.nn.Linear)), None)
        if not isinstance(head, torch.nn.Linear):
            self._check(False, "cam needs a network that ends in global average pooling and one linear layer")
        return head

    def _attention_modules(self, layer):
        """The blocks' attention, for `rollout` and `gradrollout`."""
        found = [m for m in self.model.modules()
                 if all(hasattr(m, part) for part in ("qkv", "proj", "num_heads", "scale")) and m.qkv is not None]
        if not found:
            self._check(False, f"{self.method} needs a transformer whose blocks have one qkv layer each")
        if layer is not None:
            raise ValueError(f"{self.method} follows attention through all blocks: leave the layer out")
        return found


def _parallel(model):
    """What DistributedDataParallel or DataParallel wraps, or None."""
    parallel = torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel
    return model.module if isinstance(model, parallel) else None


def _with_gradient(output):
    """`output`, or where nothing before it is trained, a copy that autograd can ask about."""
    if isinstance(output, torch.Tensor) and torch.is_grad_enabled() and not output.requires_grad \
            and output.is_floating_point() and not output.is_inference():
        # cloned, for a layer behind it may work in place, which autograd forbids on a leaf
        return output.detach().requires_grad_().clone()
    return output


def _pick(tensor, rows):
    """The rows of a tensor, or without a copy all of them."""
    return tensor if rows is None else tensor[rows]


def _at_least_float32(tensor):
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _is_average(pooled, A):
    """A function that tells whether `pooled` [B, C] is the mean of A [B, C, h, w] over its grid, but for dropout."""
    def answer():
        if pooled is None or pooled.shape != A.shape[:2]:
            return False
        kept = pooled != 0
        return _close(pooled[kept], A.float().mean((2, 3))[kept], free_scale=True)

    return answer


def _close(found, expected, free_scale=False):
    """Whether two tensors agree to 1%, in norm; with `free_scale`, up to a factor."""
    found, expected = found.float(), expected.float()
    scale = (found * expected).sum() / (expected**2).sum().clamp_min(1e-30) if free_scale else 1.0
    return (found - scale * expected).norm() <= 1e-2 * found.norm()
