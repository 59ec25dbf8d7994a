"""Heat: which pixels led the network to its prediction. From the same forward pass that trains it, on the device.

    with CAM(model, method="gradcam++") as cam:         # layer: a module, its name, "-2", or None: a rule
        logits = model(images)                          # [B, classes]
        heat = cam(logits, rows=rows, classes=classes)  # [len(rows), h, w] in [0, 1]
    heat = upsample(heat, size)                         # [N, H, W] in [0, 1]

A hook keeps the explained layer's activations A. `torch.autograd.grad` of a class's logit with respect to A walks back
through what lies behind that layer; or a loss's own backward pass brings the gradient by (`in_backward`). The model's
mode, parameters and gradients are not touched. This file serves alone in a loop of your own, where you name the layer.
To add a method, write a function of (A, G) and put it into `WEIGHTS`, `ATTENTION` or `CONTROLS`.
"""

import functools
import math
import re
import weakref

import torch
import torch.nn.functional as F

MIN_GRID = 4  # a coarser grid than 4 x 4 shows too little of where
FROM_END = re.compile(r"-[1-9]\d*", re.ASCII)  # in the place of a layer's name: -1 is the last stage, -2 the one before
MOST_PREFIX = 8  # tokens in front of the patches: class, distillation, registers
FINE_STEP = 2.0**15  # float16 gradients of a logit may lie below the smallest it can hold: taken at this scale as well

# --- methods that weigh activations: (A, G) -> weights, where heat is the channel sum of weights times A -------------
# A: activations [N, C, h, w]. G: the explained score's gradient there. float32 or float64. Weights broadcast to A.


def cam(A, G):
    """CAM, Zhou et al. 2016, equation 2: G is the linear head's row, [N, C, 1, 1], behind global average pooling."""
    return G


def gradcam(A, G):
    """Grad-CAM, Selvaraju et al. 2017, equation 1: a channel weighs its gradient's spatial mean."""
    return G.mean((2, 3), keepdim=True)


def gradcam_plus_plus(A, G):
    """Grad-CAM++, Chattopadhay et al. 2018, equations 11 and 19.

    With Y = exp(S), as the paper has it, equation 19 becomes alpha = G^2 / (2 G^2 + sum(A) G^3), and a channel weighs
    sum(alpha relu(G)). The grad-cam library's constant 1e-6 keeps the quotient finite where activations are negative.
    """
    g = G.relu()  # alpha g = g / (2 + sum(A) g + 1e-6 / g^2), in place: fresh memory costs more than the arithmetic
    denominator = g.square().reciprocal_().mul_(1e-6).add_(2).addcmul_(A.sum((2, 3), keepdim=True), g)
    return g.div_(denominator).sum((2, 3), keepdim=True)


def xgradcam(A, G):
    """XGrad-CAM, Fu et al. 2020, equation 8; the grad-cam library's 1e-7 keeps channels that are silent finite."""
    return (G * A / (A.sum((2, 3), keepdim=True) + 1e-7)).sum((2, 3), keepdim=True)


def hirescam(A, G):
    """HiResCAM, Draelos and Carin 2020, equation 5: every place weighs its own gradient."""
    return G


def layercam(A, G):
    """LayerCAM, Jiang et al. 2021, equations 5 and 6: every place weighs its own gradient where that is positive."""
    return G.relu()


def elementwise(A, G):
    """HiResCAM with each product G A cut off below zero, as the grad-cam library's GradCAMElementWise."""
    return torch.where(G * A > 0, G, 0.0)


def eigencam(A, G):
    """Eigen-CAM, Muhammad and Yeasin 2020: the first principal component of the activations, whatever the class."""
    return torch.ones_like(A[:, :1, :1, :1])


def eigengradcam(A, G):
    """Eigen-CAM of the activations times their gradients, as the grad-cam library's EigenGradCAM."""
    return G


WEIGHTS = {"cam": cam, "gradcam": gradcam, "gradcam++": gradcam_plus_plus, "xgradcam": xgradcam, "hirescam": hirescam,
           "layercam": layercam, "elementwise": elementwise, "eigencam": eigencam, "eigengradcam": eigengradcam}
EIGEN = {"eigencam", "eigengradcam"}  # project on the first principal component instead of summing over channels


# --- methods that follow attention through the blocks: (A, G) -> relevance [N, T, T] of each token for each ----------
# A: list of attention probabilities [N, heads, T, T], first block first. G: the score's gradient with respect to each.


def rollout(A, G):
    """Attention rollout, Abnar and Zuidema 2020: heads averaged, half of each token kept, blocks multiplied."""
    relevance = identity = torch.eye(A[0].shape[-1], dtype=A[0].dtype, device=A[0].device)
    for attention in A:
        relevance = (attention.mean(1) + identity) / 2 @ relevance
    return relevance


def gradrollout(A, G):
    """Chefer et al. 2021 (ICCV), equations 5 and 6: each block adds mean_heads(relu(G A)) times relevance to it."""
    relevance = torch.eye(A[0].shape[-1], dtype=A[0].dtype, device=A[0].device).expand(len(A[0]), -1, -1)
    for attention, gradient in zip(A, G):
        relevance = relevance + (gradient * attention).relu().mean(1) @ relevance
    return relevance


ATTENTION = {"rollout": rollout, "gradrollout": gradrollout}

# --- controls: they look at nothing but the grid of A ---------------------------------------------------------------


def random(A, G):
    """A smooth random field, new for every image: 4 x 4 normal values, bilinear in between."""
    field = torch.randn(len(A), 1, MIN_GRID, MIN_GRID).to(A.device, A.dtype, non_blocking=A.device.type != "mps")
    # 10 more, so that the ReLU behind every method keeps all of it
    return F.interpolate(field, A.shape[2:], mode="bilinear", align_corners=False)[:, 0] + 10


def center(A, G):
    """A centred Gaussian with a standard deviation of a quarter of the side: where photographers put things."""
    down, across = (((torch.arange(n, device=A.device, dtype=A.dtype) + 0.5) / n - 0.5) / 0.25 for n in A.shape[2:])
    return torch.exp(-0.5 * (down[:, None] ** 2 + across**2)).expand(len(A), -1, -1)


CONTROLS = {"random": random, "center": center}
METHODS = (*WEIGHTS, *ATTENTION, *CONTROLS)
NO_GRADIENT = {"cam", "eigencam", "rollout", *CONTROLS}

# --- which score is explained: (logits [N, C], labels [N] or shares [N, C]) -> classes and against, as `CAM` takes them


def true_class(labels):
    """The label's class, int64 [N]; of a mixed label the one with the larger share."""
    return labels if labels.dim() == 1 else labels.argmax(1)


def margin(logits, labels):
    """The true class's logit less the best other."""
    return (classes := true_class(labels)), logits.detach().scatter(1, classes[:, None], -torch.inf).argmax(1)


def loss(logits, labels):
    """The cross-entropy: what a logit weighs is its gradient there, softmax less label."""
    shares = torch.zeros_like(logits).scatter(1, labels[:, None], 1) if labels.dim() == 1 else labels
    return logits.detach().float().softmax(1) - shares, None


EXPLAIN = {"predicted": lambda logits, labels: (logits.detach().argmax(1), None),
           "true": lambda logits, labels: (true_class(labels), None), "margin": margin, "loss": loss}

# --- from maps to heat ---------------------------------------------------------------------------------------------


def rescale(maps):
    """Maps [N, h, w] shifted and scaled per image to [0, 1]; a map without contrast, or not finite, becomes 0."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return torch.nan_to_num((maps - low) / (high - low), nan=0.0, posinf=0.0, neginf=0.0)


def upsample(heat, size):
    """Heat [N, h, w] at image size [N, H, W], bilinear, rescaled to [0, 1] per image. size: H = W, or (H, W)."""
    return rescale(F.interpolate(heat[:, None], size, mode="bilinear", align_corners=False)[:, 0])


class CAM:
    """Heat from the forward passes made inside the `with` block. The same object may be entered again and again.

    model: a timm network, or any nn.Module with `layer` given. method: one of METHODS. layer: a module of `model`, its
    name, or None for the rule: the deepest layer that keeps a 4 x 4 grid, among the stages that timm names
    (`feature_info`) and what follows the last of them; "-2" is the stage before the last, whatever its grid. Where a
    class token alone is read out, the last block's output has no gradient at the patches; there it is that block's
    first norm. The choice is made at the first forward pass and then kept, as `layer_name`. compiled: whether the model
    will be compiled; make the CAM before it is called for the first time.
    Raises ValueError, naming what would serve, for an unknown method or layer and where no layer or method fits.
    """

    def __init__(self, model, method="gradcam", layer=None, compiled=False):
        if method not in METHODS:
            raise ValueError(f"unknown CAM method {method!r}; there are {', '.join(METHODS)}")
        wrappers = unwrap(model)
        self.model, self.method = wrappers[-1], method
        self._compiled = compiled or any(hasattr(w, "_orig_mod") or getattr(w, "_compiled_call_impl", None)
                                         for w in wrappers)
        if self._compiled:  # the compiler is to see hooks, and to let the graph be walked twice
            torch._dynamo.config.skip_nnmodule_hook_guards = False
            torch._functorch.config.donated_buffer = False
        self.names = {module: name for name, module in self.model.named_modules()}
        self.prefix = getattr(self.model, "num_prefix_tokens", 0)
        self.prefixes = (self.prefix, 0) if hasattr(self.model, "num_prefix_tokens") else range(MOST_PREFIX + 1)
        self.layer = self._awaited = None
        self._hooks, self._parts, self.checked, self.min_grid = [], [], False, MIN_GRID
        if method == "cam" or method in ATTENTION:
            self._parts.append(_engine().Head(self) if method == "cam" else _engine().Attention(self, layer))
        if layer is not None and not (isinstance(layer, str) and FROM_END.fullmatch(layer)):
            self.layer = self._find(layer)
        elif method not in ATTENTION:
            self._parts.append(_engine().Rule(self, layer))
        self.release()

    @property
    def layer_name(self):
        """Name of the explained layer; None before the rule has chosen, or for attention."""
        return self.names.get(self.layer)

    def _find(self, layer):
        """The module that `layer` names, or is."""
        module = dict(self.model.named_modules()).get(layer.strip()) if isinstance(layer, str) else layer
        if module not in self.names:
            what = layer if isinstance(layer, str) else type(layer).__name__
            parts = ", ".join(dict(self.model.named_children()))
            raise ValueError(f"no layer {what!r} in this network; its parts are {parts}")
        return module

    def __enter__(self):
        if self._hooks:
            raise RuntimeError("this CAM's block has been entered already")
        self.hook(self.model.register_forward_pre_hook, self._before, with_kwargs=True)
        for part in self._parts:
            part.add_hooks()
        if self.layer is not None:
            self.explain_layer(self.layer)
        return self

    def hook(self, register, function, **options):
        """Register a hook for this block, run between compiled graphs: within one, autograd cannot reach A."""
        self._hooks.append(register(torch.compiler.disable(function) if self._compiled else function, **options))

    def __exit__(self, *exception):
        while self._hooks:
            self._hooks.pop().remove()
        if self._awaited is None:
            self.release()

    def release(self):
        """Forget the last forward pass."""
        if self._awaited is not None:
            self._awaited.remove()  # for it holds the graph that holds it
        self.activations, self._logits, self._awaited = {}, None, None
        for part in self._parts:
            part.release()

    def _before(self, module, args, kwargs):
        self.release()
        images = next((t for t in (*args, *kwargs.values()) if torch.is_tensor(t) and t.dim() > 3), None)
        if images is None:
            raise ValueError("expected a forward pass of images, [B, 3, H, W]")
        self.batch, self.height, self.width, self.device_type = len(images), *images.shape[-2:], images.device.type

    def explain_layer(self, layer, output=None):
        """Keep what this module gives in later passes, and `output`, of the pass that goes on."""
        def keep(module, args, output):
            first, *others = output if type(output) is tuple else (output,)
            first = self.activations[0] = self.with_gradient(first)
            first = first.clone() if torch.is_tensor(first) else first  # a layer behind it may work in place
            return (first, *others) if type(output) is tuple else first

        self.layer, self.activations = layer, {} if output is None else {0: output}
        self.hook(layer.register_forward_hook, keep)

    @staticmethod
    def with_gradient(output):
        """`output`, or where nothing before it is trained a copy, which is no leaf, that autograd can ask about."""
        if isinstance(output, torch.Tensor) and torch.is_grad_enabled() and not output.requires_grad \
                and output.is_floating_point() and not output.is_inference():
            return output.detach().requires_grad_().clone()
        return output

    def grid(self, tensor):
        """Output of a layer as [B, C, h, w], or None where it is not a map of the image.

        Tokens [B, T, C] lose the prefix tokens, found where a network does not count its own by what is left: a grid
        in the image's very proportions. [B, h, w, C] is told from [B, C, h, w] by these proportions.
        """
        if tensor.shape[0] != self.batch or tensor.dim() not in (3, 4):
            return None
        if tensor.dim() == 3:
            for prefix in self.prefixes:  # 0 too: some networks add their class token in later blocks
                sides = self.token_grid(tensor.shape[1] - prefix)
                if sides and (prefix in (self.prefix, 0) or sides[0] * self.width == sides[1] * self.height):
                    return tensor[:, prefix:].transpose(1, 2).unflatten(2, sides)
            return None
        first, last = (abs(h * self.width / self.height - w) <= 1 for h, w in (tensor.shape[2:], tensor.shape[1:3]))
        if last and (not first or getattr(self.model, "output_fmt", "NCHW") == "NHWC"):
            return tensor.permute(0, 3, 1, 2)
        return tensor if first else None

    def token_grid(self, count):
        """(h, w) of a grid of `count` tokens in the image's proportions, or None."""
        h = round(math.sqrt(max(count, 0) * self.height / self.width))
        fits = h > 0 and count % h == 0 and abs(h * self.width / self.height - count // h) <= 1
        return (h, count // h) if fits else None

    @torch.no_grad()
    def __call__(self, logits, rows=None, classes=None, against=None):
        """Heat for some images of the last forward pass.

        logits: [B, classes], the model's output for that pass. rows: int64 [N] images to explain, all by default; none
          is fine. classes: class to explain for each, int64 [N] or one int, the predicted one by default; or what each
          logit weighs in the score, float [N, classes]. against: a class for each, or one, whose logit is subtracted,
          so that the margin between the two is explained. Returns [N, h, w] in [0, 1] on the logits' device, float32
          (float64 for a float64 model), with no graph attached.
        """
        if not self.activations:
            raise RuntimeError("no forward pass to explain: call the model inside the `with` block first"
                               + (", and a compiled one not before the CAM is made" if self._compiled else ""))
        found = [*getattr(logits, "shape", [type(logits).__name__])]
        if len(found) != 2 or found[0] != self.batch:
            raise ValueError(f"expected the logits of that pass, [{self.batch}, classes]; found {found}")
        kept = self.activations  # goes when these logits go, and not only at the next forward pass
        self._logits = weakref.ref(logits, lambda _: self.release() if self.activations is kept else None)
        rows = torch.as_tensor(range(self.batch) if rows is None else rows, device=logits.device)
        rows = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows.long()
        classes = logits[rows].argmax(1) if classes is None else classes
        weights = torch.as_tensor(classes, device=logits.device)  # of the logits in the score
        if weights.dim() < 2:
            weights = logits.new_zeros(len(rows), logits.shape[1])
            for each, sign in ((classes, 1), (against, -1)):
                if each is not None:
                    each = torch.as_tensor(each, device=logits.device).expand(len(rows))[:, None]
                    weights.scatter_add_(1, each, torch.full_like(weights[:, :1], sign))
        return self._heat(functools.partial(self._gradients, logits, rows, weights), rows, weights)

    def in_backward(self, loss, images, rows, then):
        """Call `then` in the loss's own backward pass, with a function that gives the heat: no walk for it.

        The heat is that of `EXPLAIN["loss"]`, all images explained together. loss: the mean of the last forward pass
        over so many `images`; what it is multiplied by, as by a gradient scaler, is divided out. rows: int64 [N].
        """
        scale = []
        loss.register_hook(lambda gradient: scale.append(images / gradient))

        @torch.no_grad()
        def arrived(gradients):
            own = [gradient.to(torch.promote_types(gradient.dtype, torch.float32)) * scale[0] for gradient in gradients]
            then(lambda: self._heat(lambda tensors: own, rows))
            self.release()

        self._awaited = torch.autograd.graph.register_multi_grad_hook(list(self.activations.values()), arrived)

    def _heat(self, gradients, rows, weights=None):
        """As `__call__`. gradients: tensors that were kept -> the score's gradients with respect to these."""
        gradients = None if self.method in NO_GRADIENT else gradients
        with torch.autocast(self.device_type, enabled=False):
            if self.method in ATTENTION:
                return rescale(self._parts[0].relevance(ATTENTION[self.method], gradients, rows))
            if not torch.is_tensor(self.activations[0]) or (A := self.grid(self.activations[0])) is None:
                raise ValueError(f"layer {self.layer_name} is no map of {self.height}x{self.width} images; try another")
            G = self._parts[0].weights(A, weights) if self.method == "cam" else None
            A = A[rows].to(torch.promote_types(A.dtype, torch.float32))
            if self.method in CONTROLS:
                return rescale(CONTROLS[self.method](A, None).relu())
            if gradients:
                gradient, = gradients([self.activations[0]])
                G = self.grid(gradient)[rows]
                self.checked = self.checked or bool(G.any())  # not asked again: the device has to answer
                if not self.checked and gradient.any():
                    raise ValueError(f"behind layer {self.layer_name} a class token is read, and no patch: name one "
                                     "before, as the first norm of the last block")
            weighted = WEIGHTS[self.method](A, G).to(A.dtype) * A
            return rescale((_engine().principal(weighted) if self.method in EIGEN else weighted.sum(1)).relu())

    def _gradients(self, logits, rows, weights, tensors):
        """The score's gradient with respect to each tensor, all rows of the batch, float32 or float64."""
        refused = ValueError(f"{self.method} needs gradients: run the forward pass outside torch.no_grad() and "
                             "inference_mode(), ask before loss.backward(), and name a layer that the logits depend on")
        if not (logits.requires_grad and all(isinstance(t, torch.Tensor) and t.requires_grad for t in tensors)):
            raise refused
        of_logits = torch.zeros_like(logits).index_copy_(0, rows, weights.to(logits.dtype))

        def take(scale):
            try:
                taken = torch.autograd.grad(logits, tensors, of_logits * scale, retain_graph=True)
            except RuntimeError as error:
                raise (refused if "the graph" in str(error) else error) from None
            return [gradient.to(torch.promote_types(gradient.dtype, torch.float32)) for gradient in taken]

        gradients = take(1)
        if logits.dtype == torch.float16:
            # float16 spans 2^-24 to 2^16. Taken twice, so that neither small nor large gradients are lost.
            for i, fine in enumerate(take(FINE_STEP)):
                finite = fine.isfinite().flatten(1).all(1).view(-1, *[1] * (fine.dim() - 1))
                gradients[i] = torch.where(finite, fine / FINE_STEP, gradients[i])
        return gradients


def _engine():
    """What the rule for the layer, attention and `cam` need; not there where this file serves alone."""
    try:
        from engine import hooks
    except ImportError:
        raise ValueError("without engine/hooks.py beside cam.py, name the layer to explain and a method that weighs "
                         "activations by a gradient") from None
    return hooks


def unwrap(model):
    """[the model, what its wrapper holds, …]: of torch.compile, DistributedDataParallel and DataParallel."""
    parallel = torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel
    inside = model.module if isinstance(model, parallel) else getattr(model, "_orig_mod", None)
    return [model, *unwrap(inside)] if inside is not None else [model]
