"""Heat: which pixels led the network to its prediction. From the same forward pass that trains it, on the device.

    with CAM(model, method="gradcam++") as cam:         # layer: a module, its name, "-2", or None: a rule
        logits = model(images)                          # [B, classes]
        heat = cam(logits, rows=rows, classes=classes)  # [len(rows), h, w] in [0, 1]
    heat = upsample(heat, size)                         # [N, H, W] in [0, 1]

A hook keeps the explained layer's activations A; `torch.autograd.grad` of a class's logit with respect to A walks back
through what lies behind that layer only, and the formula is a few sums over A's grid. The model's mode, parameters and
gradients are not touched, and nothing outlives the `with` block.

To add a method, write a function of (activations, gradients) and put it into `WEIGHTS`, `ATTENTION` or `CONTROLS`.
"""

import weakref

import torch
import torch.nn.functional as F

from engine.hooks import MIN_GRID, Hooks, unwrap

FINE_STEP = 2.0**15  # float16 gradients of a logit may lie below the smallest it can hold: taken at this scale as well

# --- methods that weigh activations: (A, G) -> weights, where heat is the channel sum of weights times A -------------
# A: activations [N, C, h, w]. G: gradient of the explained score with respect to A, same shape. Both float32 or
# float64. Weights: anything that broadcasts to A.


def cam(A, G):
    """CAM, Zhou et al. 2016, equation 2: a channel weighs what the linear head gives it.

    G holds the head's row as [N, C, 1, 1]. For networks that end in global average pooling and a linear layer; no
    gradient is taken.
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
    # alpha g = g / (2 + sum(A) g + 1e-6 / g^2), in place where it can be, as fresh memory costs more than the
    # arithmetic
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
    """HiResCAM with each product G A cut off below zero before the sum, as the grad-cam library's
    GradCAMElementWise.
    """
    return torch.where(G * A > 0, G, 0.0)


def eigencam(A, G):
    """Eigen-CAM, Muhammad and Yeasin 2020: the first principal component of the activations, whatever the class."""
    return torch.ones_like(A[:, :1, :1, :1])


def eigengradcam(A, G):
    """Eigen-CAM of the activations times their gradients, as the grad-cam library's EigenGradCAM: it depends on the
    class.
    """
    return G


WEIGHTS = {"cam": cam, "gradcam": gradcam, "gradcam++": gradcam_plus_plus, "xgradcam": xgradcam, "hirescam": hirescam,
           "layercam": layercam, "elementwise": elementwise, "eigencam": eigencam, "eigengradcam": eigengradcam}
EIGEN = {"eigencam", "eigengradcam"}  # project on the first principal component instead of summing over channels


def principal(maps):
    """Maps [N, C, h, w], each place a point in C dimensions, projected on their first principal component: [N, h, w].

    Found as the top eigenvector of the hw x hw Gram matrix, which is small whatever C is. Its sign is arbitrary; here
    the largest value in size is positive, as in Seg-Eigen-CAM (Chung and Ying 2025, equation 13).
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
    """Attention rollout, Abnar and Zuidema 2020, section 3: heads averaged, half of each token kept, blocks
    multiplied.
    """
    relevance = identity = torch.eye(A[0].shape[-1], dtype=A[0].dtype, device=A[0].device)
    for attention in A:
        relevance = (attention.mean(1) + identity) / 2 @ relevance
    return relevance


def gradrollout(A, G):
    """Generic attention explainability, Chefer et al. 2021 (ICCV), equations 5 and 6, for self-attention.

    R starts as the identity and gains mean_heads(relu(G A)) R in each block. (Their CVPR 2021 paper propagates
    relevance through every layer instead, and needs rules for each.)
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
OTHERS = f"use {' or '.join(method for method in WEIGHTS if method != 'cam')}"  # what serves any network


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


class CAM(Hooks):
    """Heat from the forward passes made inside the `with` block. The same object may be entered again and again.

    model, layer, compiled: as in `Hooks`. method: a key of `METHODS`.
    Raises ValueError, naming what would serve, for an unknown method or layer and where no layer or method fits.

    Under `torch.compile`, make the CAM before the compiled model is called for the first time. Each hook breaks the
    compiled graph in two.
    """

    def __init__(self, model, method="gradcam", layer=None, compiled=False):
        if method not in METHODS:
            raise ValueError(f"unknown CAM method {method!r}; there are {', '.join(METHODS)}")
        self.method = method
        self._checked = False  # whether head or attention were seen to be what the method takes them for
        head = self._linear_head(unwrap(model)[-1]) if method == "cam" else None
        super().__init__(model, layer, method in ATTENTION, head, compiled)

    def release(self):
        super().release()
        self._logits = None

    @torch.no_grad()
    def __call__(self, logits, rows=None, classes=None, against=None):
        """Heat for some images of the last forward pass.

        logits: [B, classes], the model's output for that pass. rows: int64 [N] images to explain, all by default; none
          is fine. classes: class to explain for each, int64 [N] or one int; the predicted one by default. against: a
          class for each, or one, whose logit is subtracted, so that the margin between the two is explained. Returns
          [N, h, w] in [0, 1] on the logits' device, float32 (float64 for a float64 model), with no graph attached.
        """
        if not self.activations:
            raise RuntimeError("no forward pass to explain: call the model inside the `with` block first"
                               + (", and a compiled one not before the CAM is made" if self._compiled else ""))
        if self._logits is None or self._logits() is not logits:
            # What was kept for these logits goes when they go, and not only at the next forward pass.
            kept = self.activations
            self._logits = weakref.ref(logits, lambda _: self.release() if self.activations is kept else None)
        if rows is not None:
            rows = torch.as_tensor(rows, device=logits.device)
            rows = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows.long()
        count = len(logits) if rows is None else len(rows)
        if classes is None:
            classes = _pick(logits.detach(), rows).argmax(1)
        classes, against = (None if c is None else torch.as_tensor(c, device=logits.device).expand(count)
                            for c in (classes, against))
        with torch.autocast(logits.device.type, enabled=False):
            from_what = self._from_attention if self.attentions else self._from_layer
            return from_what(logits, rows, classes, against)

    def _from_layer(self, logits, rows, classes, against):
        A = self.activations[0]
        A = self.grid(A) if isinstance(A, torch.Tensor) else None
        if A is None:
            raise ValueError(f"layer {self.layer_name} gives no map of images of {self.height}x{self.width}: name "
                             "another")
        if self.method == "cam":
            self._check(_is_average(self.pooled, A),
                        f"cam needs a linear head on the global average of layer {self.layer_name}")
        A = _pick(A, rows).to(_at_least_float32(A))
        if len(A) == 0:
            return A.new_zeros(0, *A.shape[2:])
        if self.method in CONTROLS:
            return rescale(CONTROLS[self.method](A, None).relu())
        G = None
        if self.method == "cam":
            head = self._head.weight.detach()
            G = (head[classes] - (0 if against is None else head[against]))[:, :, None, None].to(A.dtype)
        elif self.method not in NO_GRADIENT:
            gradient, = self._gradients(logits, [self.activations[0]], rows, classes, against)
            G = _pick(self.grid(gradient), rows)
        weighted = WEIGHTS[self.method](A, G) * A
        return rescale((principal(weighted) if self.method in EIGEN else weighted.sum(1)).relu())

    def _from_attention(self, logits, rows, classes, against):
        first = self.activations[0]
        every = first.dim() == 3 and first.shape[0] == self.batch  # windows would come as more than one per image
        sides = self.token_grid(first.shape[1] - self.prefix) if every else None
        if sides is None or min(sides) < MIN_GRID:
            raise ValueError(f"{self.method} needs attention over all of the image, at least {MIN_GRID}x{MIN_GRID} "
                             "patches; use gradcam, or larger images")
        dtype = _at_least_float32(first)
        if len(classes) == 0:
            return torch.zeros(0, *sides, dtype=dtype, device=logits.device)
        unread = f"{self.method} cannot read this network's attention, which is more than a softmax of q k^T"
        if len(self.qkv) < len(self.attentions):  # some blocks use their qkv layer's weights without calling it
            self._check(lambda: False, unread)
        A, V = zip(*(self._attend(module, _pick(self.qkv[i].detach(), rows).to(dtype))
                     for i, module in enumerate(self.attentions)))
        mixed = [_pick(self.activations[i].detach(), rows).to(dtype) for i in range(len(A))]
        self._check(lambda: all(_close((a @ v).transpose(1, 2).flatten(2), o) for a, v, o in zip(A, V, mixed)), unread)
        G = None
        if self.method not in NO_GRADIENT:
            of_mixed = self._gradients(logits, [self.activations[i] for i in range(len(A))], rows, classes, against)
            # The output of a head is its probabilities times v, so that is how the gradient comes back to them.
            G = [_pick(g, rows).unflatten(2, (v.shape[1], -1)).transpose(1, 2) @ v.transpose(2, 3)
                 for g, v in zip(of_mixed, V)]
        relevance = ATTENTION[self.method](A, G)
        read = relevance[:, 0] if self.reads_class_token() else relevance[:, self.prefix:].mean(1)
        return rescale(read[:, self.prefix:].unflatten(1, sides))

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
            for i, fine in enumerate(take(FINE_STEP)):
                finite = fine.isfinite().flatten(1).all(1).view(-1, *[1] * (fine.dim() - 1))
                gradients[i] = torch.where(finite, fine / FINE_STEP, gradients[i])
        return gradients

    def _check(self, fits, problem):
        """Once, as the answer has to come back from the device."""
        self._checked = self._checked or bool(fits())
        if not self._checked:
            raise ValueError(f"{problem}; {OTHERS}")

    @staticmethod
    def _linear_head(model):
        """The linear head, for `cam`."""
        head = model.get_classifier() if hasattr(model, "get_classifier") else None
        head = head or next((m for m in reversed(list(model.modules())) if isinstance(m, torch.nn.Linear)), None)
        if not isinstance(head, torch.nn.Linear):
            raise ValueError(f"cam needs a network that ends in global average pooling and one linear layer; {OTHERS}")
        return head


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
