"""Which layer is explained, and what hooks keep of a forward pass for it.

    with Hooks(model) as hooks:
        logits = model(images)
        hooks.activations[0]            # the explained layer's output, with a graph from it to the logits

The rule for the layer: the deepest one that keeps at least a 4 x 4 grid, among the stages that timm names
(`feature_info`) and what follows the last of them. The model's mode, parameters and gradients are not touched, and
nothing outlives the `with` block.
"""

import math
import re

import torch

MIN_GRID = 4  # a coarser grid than 4 x 4 shows too little of where
FROM_END = re.compile(r"-[1-9]\d*", re.ASCII)  # in the place of a layer's name: -1 is the last stage, -2 the one before


class Hooks:
    """What `cam.CAM` keeps of the forward passes made inside the `with` block; it may be entered again and again.

    model: a timm network, or any nn.Module with `layer` given. layer: a module of `model`, its name, or None for the
      rule; "-2" is the stage before the last, whatever its grid. Where a class token alone is read out, the last
      block's output has no gradient at the patches; there it is that block's first norm. The choice is made at the
      first forward pass and then kept. attention: keep what every block attends to, instead of one layer. head: a
      linear layer whose input is kept as well. compiled: whether the model will be compiled; one that is compiled
      already shows that itself. Raises ValueError, naming what would serve, for an unknown layer and where no layer
      fits.
    """

    def __init__(self, model, layer=None, attention=False, head=None, compiled=False):
        wrappers = unwrap(model)
        self.model = wrappers[-1]
        self._compiled = compiled or any(hasattr(w, "_orig_mod") or getattr(w, "_compiled_call_impl", None)
                                         for w in wrappers)
        if self._compiled:  # the compiler is to look at hooks, and to let the graph be walked twice
            torch._dynamo.config.skip_nnmodule_hook_guards = False
            torch._functorch.config.donated_buffer = False
        self._names = {module: name for name, module in self.model.named_modules()}
        self._stages = [info["module"] for info in getattr(self.model, "feature_info", [])]
        self.prefix = getattr(self.model, "num_prefix_tokens", 0)
        self._head = head
        self.attentions = self._attention_modules(layer) if attention else []
        self._stage = int(layer) if isinstance(layer, str) and FROM_END.fullmatch(layer) else None
        self.layer = None if layer is None or self._stage else self._find(layer)
        if self.layer is None and not (self._stages or self.attentions):
            raise ValueError("this network does not name its stages: name the layer to explain, one of "
                             f"{', '.join(name for name in self._names.values() if name)}")
        self._hooks = []
        self.release()

    @property
    def layer_name(self):
        """Name of the explained layer; None before the rule has chosen, or for attention."""
        return self._names.get(self.layer)

    def _find(self, layer):
        """The module that `layer` names, or is."""
        by_name = {name: module for module, name in self._names.items()}
        module = by_name.get(layer.strip()) if isinstance(layer, str) else layer
        if module not in self._names:
            what = f"no layer {layer!r} in this network" if isinstance(layer, str) else "a layer is not of this network"
            raise ValueError(f"{what}; its parts are {', '.join(name for name, _ in self.model.named_children())}")
        return module

    def _attention_modules(self, layer):
        """The blocks' attention, for `rollout` and `gradrollout`."""
        found = [m for m in self.model.modules()
                 if all(hasattr(m, part) for part in ("qkv", "proj", "num_heads", "scale")) and m.qkv is not None]
        if not found:
            raise ValueError("attention needs a transformer whose blocks have one qkv layer each; use gradcam")
        if layer is not None:
            raise ValueError("attention is followed through all blocks: leave the layer out")
        return found

    # hooks, and what they keep

    def __enter__(self):
        if self._hooks:
            raise RuntimeError("this CAM's block has been entered already")
        self._hooks.append(self.model.register_forward_pre_hook(self._outside_graph(self._before), with_kwargs=True))
        if self._head is not None:
            self._hooks.append(self._head.register_forward_pre_hook(self._outside_graph(self._keep_pooled)))
        if self.attentions:
            self._hook_attention()
        elif self.layer is not None:  # an empty container counts as false
            self._hook_layer()
        else:
            for name, module in self.model.named_modules():
                if name:
                    hook = module.register_forward_hook(lambda m, i, out, name=name: self._keep_candidate(name, out))
                    self._hooks.append(hook)
            self._hooks.append(self.model.register_forward_hook(lambda *_: self._choose()))
        return self

    def _hook_layer(self):
        def keep(module, args, output):
            output = self.activations[0] = _with_gradient(output)
            return output

        self._hooks.append(self.layer.register_forward_hook(self._outside_graph(keep)))

    def _hook_attention(self):
        for position, module in enumerate(self.attentions):
            def keep_qkv(module, args, output, position=position):
                self.qkv[position] = output

            def keep_mixed(module, args, position=position):
                self.activations[position] = _with_gradient(args[0])
                return self.activations[position], *args[1:]

            self._hooks.append(module.qkv.register_forward_hook(self._outside_graph(keep_qkv)))
            mixed = getattr(module, "norm", module.proj)
            self._hooks.append(mixed.register_forward_pre_hook(self._outside_graph(keep_mixed)))

    def _outside_graph(self, hook):
        """`hook`, run between compiled graphs: in one, A would be an output that autograd cannot reach from the
        logits.
        """
        return torch.compiler.disable(hook) if self._compiled else hook

    def __exit__(self, *exception):
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.release()

    def release(self):
        """Forget the last forward pass."""
        self._candidates_kept, self.activations, self.qkv, self.pooled = [], {}, {}, None

    def _before(self, module, args, kwargs):
        self.release()
        images = args[0] if args else next(iter(kwargs.values()))
        self.batch, self.height, self.width = images.shape[0], images.shape[-2], images.shape[-1]

    def _keep_candidate(self, name, output):
        if isinstance(output, torch.Tensor) and output.is_floating_point() and output.dim() > 2:
            output = _with_gradient(output)
            self._candidates_kept.append((name, output))
            return output

    def _keep_pooled(self, module, args):
        self.pooled = args[0].detach()

    # which layer

    def _choose(self):
        """Fix the explained layer, from the names and outputs that the first forward pass went through."""
        kept = self._candidates_kept
        candidates = self._candidates([name for name, _ in kept])
        grids = [(name, output, *self.grid(output).shape[-2:]) for name, output in kept
                 if name in candidates and self.grid(output) is not None]
        fine = [g for g in grids if self._stage or min(g[2:]) >= MIN_GRID]
        if not fine:
            sizes = ", ".join(dict.fromkeys(f"{name} {h}x{w}" for name, _, h, w in grids)) or "none"
            raise ValueError(f"no layer keeps a {MIN_GRID}x{MIN_GRID} grid for images of {self.height}x{self.width} "
                             f"(grids: {sizes}): use larger images, or name a layer")
        deepest = fine[-1][1]
        # Several modules may give this very tensor: an identity, a container. The stage, or else the outermost, names
        # it.
        same = [name for name, output, *_ in fine if output is deepest]
        name = min(same, key=lambda name: (name not in self._stages, name.count(".")))
        self.layer, self.activations, self._candidates_kept = self.model.get_submodule(name), {0: deepest}, []
        stay = 1 if self._head is None else 2  # `_before` and `_keep_pooled`
        for hook in self._hooks[stay:]:
            hook.remove()
        self._hooks = self._hooks[:stay]
        self._hook_layer()

    def _candidates(self, order):
        """Names that the rule allows, given all names in order of execution."""
        stages = [name for name in order if name in self._stages]
        if not stages:
            serve = dict.fromkeys(name for name, output in self._candidates_kept if self.grid(output) is not None
                                  and min(self.grid(output).shape[-2:]) >= MIN_GRID and name.count(".") < 4)
            raise ValueError("this network does not give its stages as one tensor each: name the layer to explain, as "
                             f"{' or '.join(list(serve)[-4:]) or 'none that keeps a grid'}")
        if self._stage and -self._stage > len(stages):
            raise ValueError(f"this network has no layer {self._stage}: it has {len(stages)} stages, "
                             f"{', '.join(stages)}")
        if self.reads_class_token():
            inside = [name for name in order if name.startswith(stages[self._stage or -1] + ".")]
            return set(inside[:1])
        if self._stage:
            return {stages[self._stage]}
        # What follows the last stage counts where it is a part of the network's own, as a last norm or convolution.
        return {*stages, *(name for name in order[order.index(stages[-1]):] if "." not in name)}

    def reads_class_token(self):
        """Whether the head reads a class token alone, and no patch."""
        return self.prefix > 0 and getattr(self.model, "global_pool", "token") in ("token", "")

    def grid(self, tensor):
        """Output of a layer as [B, C, h, w], or None where it is not a map of the image.

        Tokens [B, T, C] lose the prefix tokens; [B, h, w, C] is told from [B, C, h, w] by the image's proportions.
        """
        if tensor.shape[0] != self.batch:
            return None
        if tensor.dim() == 3:
            for prefix in (self.prefix, 0):  # some networks add their class token in later blocks
                sides = self.token_grid(tensor.shape[1] - prefix)
                if sides:
                    return tensor[:, prefix:].transpose(1, 2).unflatten(2, sides)
            return None
        if tensor.dim() != 4:
            return None
        first, last = (abs(h * self.width / self.height - w) <= 1 for h, w in (tensor.shape[2:], tensor.shape[1:3]))
        if last and (not first or getattr(self.model, "output_fmt", "NCHW") == "NHWC"):
            return tensor.permute(0, 3, 1, 2)
        return tensor if first else None

    def token_grid(self, count):
        """(h, w) of a grid of `count` tokens in the image's proportions, or None."""
        h = round(math.sqrt(max(count, 0) * self.height / self.width))
        if h == 0 or count % h or abs(h * self.width / self.height - count // h) > 1:
            return None
        return h, count // h


def unwrap(model):
    """The model, and what lies inside of torch.compile's, DistributedDataParallel's and DataParallel's wrappers, as a
    list.
    """
    parallel = torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel
    inside = model.module if isinstance(model, parallel) else getattr(model, "_orig_mod", None)
    return [model, *unwrap(inside)] if inside is not None else [model]


def _with_gradient(output):
    """`output`, or where nothing before it is trained, a copy that autograd can ask about."""
    if isinstance(output, torch.Tensor) and torch.is_grad_enabled() and not output.requires_grad \
            and output.is_floating_point() and not output.is_inference():
        # cloned, for a layer behind it may work in place, which autograd forbids on a leaf
        return output.detach().requires_grad_().clone()
    return output
