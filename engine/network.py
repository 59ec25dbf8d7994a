"""The network of a run, and the device it runs on: built by timm, with weights from timm or from a file.

    device = pick_device("auto")                           # with its index, and its kernels there
    model, text = build_network(config, classes=29)        # on the CPU; text: what its weights are
    layer, grid = try_network(config, model)               # does it fit image size, method and layer?
"""

import contextlib
import http.client
import os
import re
import urllib.error
import urllib.request
import warnings
from collections import Counter
from pathlib import Path

import torch

import cam
from engine.files import UserError, short_reason


HUB_SECONDS = 10  # for an answer; the hub's own library tries for a minute


def build_network(config, classes, pretrained=True):
    """The network of a resolved config, on the CPU, and a text on the weights that it starts with.

    classes: number of outputs. pretrained: False for a network whose weights will be loaded from a checkpoint anyway.
    Returns (model, text). Raises UserError where the weights cannot be had.
    """
    import timm

    name, arguments, known = timm_arguments(config)
    weights = weights_file(config) if pretrained else None
    pretrained = pretrained and config["pretrained"] and not weights
    text = "starts from random weights"
    if pretrained and not (known is not None and known.has_weights):
        pretrained, text = False, f"starts from random weights, for timm has no pretrained ones for {name}"
    if pretrained:
        text = f"starts from timm's pretrained weights {name}"
        _reach_hub(known, name)
    try:
        model = timm.create_model(name, pretrained=pretrained, num_classes=classes, **arguments)
    except OSError as error:
        raise UserError(_no_hub(name, short_reason(error))) from None
    except Exception as error:  # networks raise every kind for sizes and arguments that they were not made for
        if pretrained and _builds(name, arguments):
            raise UserError(_no_hub(name, short_reason(error))) from None
        given = f" with {arguments}" if arguments else ""
        raise UserError(f"timm cannot build {name}{given}: {short_reason(error)}. Try another --image-size or "
                        "--model") from None
    if weights:
        text = load_weights(model, weights)
    return model, text


def timm_arguments(config):
    """Name and arguments by which timm builds the network of a config, and what it knows of its pretrained weights."""
    name, arguments = config["model_entry"]["timm"], dict(config["model_entry"].get("arguments", {}))
    known = pretrained_cfg(name)
    if known is not None and known.fixed_input_size:
        arguments["img_size"] = config["image_size"]
    return name, arguments, known


def described(config, classes, model=None):
    """What `network.json` holds: all that is needed to use a run's network without this program. model: if it is there.

    The weights are those under "model" in `last.pt`; the classes stand in the order of the outputs; mean and std are of
    RGB values in [0, 1].
    """
    if model is None:
        with torch.device("meta"):
            model = build_network(config, len(classes), pretrained=False)[0]
    name, arguments, _ = timm_arguments(config)
    mean, std = ([round(value, 6) for value in each.flatten().tolist()] for each in normalisation(config, model))
    return {"timm": name, "arguments": arguments, "classes": classes, "image_size": config["image_size"], "mean": mean,
            "std": std}


def _builds(name, arguments):
    """Whether timm builds the network where no weights are asked for."""
    import timm

    with contextlib.suppress(Exception), torch.device("meta"):
        return timm.create_model(name, **arguments) is not None


def head_names(config, model, classes):
    """The tensors whose shape depends on the number of classes, the head or heads: {name: the axis that does}."""
    with torch.device("meta"):
        larger = build_network(config, classes + 1, pretrained=False)[0].state_dict()
    axes = {name: [i for i, (a, b) in enumerate(zip(tensor.shape, larger[name].shape)) if a != b]
            for name, tensor in model.state_dict().items()}
    return {name: axis[0] for name, axis in axes.items() if axis}


def pretrained_cfg(name):
    """What timm knows of a network's pretrained weights, or None. UserError for a tag in NAME.TAG that it lacks."""
    import timm

    try:
        return timm.models.get_pretrained_cfg(name, allow_unregistered=True)
    except RuntimeError as error:
        bare = name.split(".")[0]
        there = timm.list_pretrained(f"{bare}.*")
        raise UserError(f"model {name}: {short_reason(error).rstrip('.')}. timm has "
                        f"{', '.join(there) or f'no pretrained weights for it: take {bare}'}") from None


def _reach_hub(known, name):
    """Fail at once where weights neither lie in the hub's cache nor can be fetched: the hub retries for a minute."""
    import huggingface_hub

    if not known.hf_hub_id:
        return
    repo = known.hf_hub_id if "/" in known.hf_hub_id and not known.hf_hub_id.endswith("/") else f"timm/{name}"
    if any(isinstance(huggingface_hub.try_to_load_from_cache(repo, file), str)
           for file in ("model.safetensors", "pytorch_model.bin")):
        return
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise UserError(_no_hub(name, "HF_HUB_OFFLINE is set"))
    address = huggingface_hub.constants.ENDPOINT
    if not address.startswith(("https://", "http://")):
        raise UserError(_no_hub(name, f"HF_ENDPOINT={address} has no scheme; expected an address as https://HOST"))
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=HUB_SECONDS).close()
    except urllib.error.HTTPError as error:
        if error.code >= 500:
            raise UserError(_no_hub(name, f"{address} answers {error}")) from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(_no_hub(name, f"{address}: {short_reason(getattr(error, 'reason', error))}")) from None


def _no_hub(name, reason):
    return (f"the pretrained weights of {name} cannot be had ({reason}). Give a local file with --weights FILE, or a "
            "folder of such (.safetensors or .pth), or train from random weights with --no-pretrained")


# Parts that wrappers put into the middle of names; those in front are found by what fits.
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Two lines of Python, which the user may run and this program never does: all tensors of a file, in a new one.
KEEP_TENSORS = """(1) import torch; keep = lambda x: x if torch.is_tensor(x) else {{k: keep(v) for k, v in \
getattr(x, 'state_dict', lambda: x)().items() if isinstance(v, (dict, torch.Tensor, torch.nn.Module))}} \
(2) torch.save(keep(torch.load({!r}, map_location='cpu', weights_only=False)), {!r})"""


def weights_file(config):
    """The file of --weights, or None: of a folder the one that has timm's name of the network. Raises UserError."""
    path = config["weights"] and Path(config["weights"])
    if not path or not path.is_dir():
        return path
    name = timm_arguments(config)[0].split(".")[0]
    for file in (path / f"{name}{end}" for end in (".safetensors", ".pth")):
        if file.is_file():
            return file
    raise UserError(f"--weights {path}: this folder has no {name}.safetensors and no {name}.pth")


def read_weights(path):
    """{name: tensor} of a `.safetensors` or PyTorch file; executes nothing in it. Raises UserError.

    Tensors within dicts, lists and tuples are named with their keys: `model.fc.weight`.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            safe = file.read(9)[8:] == b"{"
        if safe:
            from safetensors.torch import load_file

            found = load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a TorchScript program, which is refused
                found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"--weights {path}: no such file") from None
    except Exception as error:  # both libraries raise many kinds for what is not such a file
        raise UserError(f"--weights {path}: cannot be loaded: {_why_not(path, error)}") from None
    if not (tensors := dict(_tensors(found))):
        raise UserError(f"--weights {path}: holds {type(found).__name__}, and no named tensors")
    return tensors


def _why_not(path, error):
    """Why a file of weights was refused, and what to do."""
    text = str(error)
    script, other = "TorchScript" in text, re.search(r"GLOBAL (\S+) was not an allowed|got <class '(.+?)'>", text)
    if script or other:
        what = "is a TorchScript program" if script else f"holds {other[1] or other[2]}, which is more than tensors"
        serves = path.with_name(f"{path.name.split('.')[0]}-tensors.pth")
        return (f"it {what}, and loading it could run code. If you trust where it comes from, two lines of Python make "
                f"a file that serves: {KEEP_TENSORS.format(str(path), str(serves))}")
    if "blocked" in text:
        return "loading it would run code of the system's. Do not trust this file"
    reason = getattr(error, "strerror", None) or "it is no such file, or not all of it"
    return f"{reason}. Expected a .safetensors file, or one that torch.save wrote"


def _tensors(found, name=""):
    """(name, tensor) of all tensors in nested dicts, lists and tuples."""
    if isinstance(found, torch.Tensor) and name:
        yield ".".join(part for part in name.split(".") if part not in WRAPPERS), found
    elif isinstance(found, (dict, list, tuple)):
        for key, value in found.items() if isinstance(found, dict) else enumerate(found):
            yield from _tensors(value, f"{name}.{key}" if name else str(key))


def fitting(found, own):
    """What of a file's tensors is for a network: {name: tensor}, the prefix of their names there, and the others.

    found: `read_weights`. own: the network's state dict. A wrapper, a checkpoint's key, or several of these, stand as
    one prefix before the names; taken is that one under which most tensors fit, where these are most of the network's
    or of the file's. Tensors with a part of it alone, as a head that stands beside the network's body, are taken where
    they have a place.
    """
    fits, named = Counter(), Counter()
    for key, tensor in found.items():
        for start in [0, *(match.end() for match in re.finditer(r"\.", key))]:
            prefix, name = key[:start], key[start:]
            named[prefix] += name in own
            fits[prefix] += name in own and own[name].shape == tensor.shape
    serve = [prefix for prefix in fits if not prefix or 2 * named[prefix] >= min(len(own), len(found))]
    best = max(serve, key=fits.get)
    taken = {key[len(best):]: tensor for key, tensor in found.items() if key.startswith(best)}
    rest = {key: tensor for key, tensor in found.items() if not key.startswith(best)}
    for start in [match.start() + 1 for match in re.finditer(r"\.", best[:-1])][::-1] + [0]:
        for key in [key for key in rest if key.startswith(best[:start]) and key[start:] in own]:
            if key[start:] not in taken:
                taken[key[start:]] = rest.pop(key)
    return taken, best, rest


def load_weights(model, path):
    """Load what fits of a `.safetensors` or PyTorch file into `model`; returns a text with the rest, or UserError."""
    every, own = read_weights(path), model.state_dict()
    found, prefix, rest = fitting(every, own)
    fits = {k: v for k, v in found.items() if k in own and own[k].shape == v.shape}
    if not fits:
        first, its = next(iter(own)), next(iter(every))
        raise UserError(f"--weights {path}: none of its {len(every)} tensors fits {type(model).__name__}: the first is "
                        f"{its} {list(every[its].shape)}, the network's {first} {list(own[first].shape)}")
    model.load_state_dict(fits, strict=False)
    where = f", those under {prefix[:-1]!r}" if prefix else ""
    lines = [f"starts from {path}: {len(fits)} of {len(own)} tensors{where}"]
    lines += [f"  left out {k}: {list(v.shape)} in the file, {list(own[k].shape)} in the network"
              for k, v in found.items() if k in own and k not in fits]
    lines += [f"  left out {k}: the network has no such tensor" for k in found if k not in own]
    if rest:
        names = list(dict.fromkeys(key.split(".")[0] for key in rest))
        names[5:] = ["…"] * (len(names) > 5)
        lines += [f"  left out {len(rest)} tensors that are not under it: {', '.join(names)}"]
    lines += [f"  not in the file, so random: {k}" for k in own if k not in found]
    return "\n".join(lines)


def classes_of_weights(config):
    """Number of classes that the weights of a config were trained for: the file's head shows it, or else timm."""
    known = pretrained_cfg(config["model_entry"]["timm"])
    count = known.num_classes if known is not None else 1000
    if config["weights"] and known is not None and isinstance(known.classifier, str):
        with torch.device("meta"):
            own = build_network(config, count, pretrained=False)[0].state_dict()
        head = fitting(read_weights(weights_file(config)), own)[0].get(f"{known.classifier}.weight")
        count = count if head is None else len(head)
    return count


def normalisation(config, model):
    """(mean, std) [1, 3, 1, 1] for values in [0, 1]: the dataset's, or those that the network was pretrained with."""
    given = config["dataset_entry"]["normalisation"]
    if given == "network":
        given = {key: getattr(model, "pretrained_cfg", {}).get(key) or fallback for key, fallback in
                 (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225)))}  # ImageNet's
    return tuple(torch.tensor(given[key], dtype=torch.float32).view(1, 3, 1, 1) for key in ("mean", "std"))


def try_network(config, model):
    """One heat, in eval mode, that shows whether network, image size, method and layer fit together.

    Returns name and grid (h, w) of the explained layer, or (None, None) for --cam none. The model stays as it was.
    """
    explain = contextlib.nullcontext()
    size, training, first = config["image_size"], model.training, next(model.parameters())
    what, gradient = f"{config['model']} with images of {size}x{size}", config["cam"] not in ("none", *cam.NO_GRADIENT)
    try:
        if config["cam"] != "none":
            what = f"--cam {config['cam']} with {what}"
            explain = cam.CAM(model, config["cam"], config["layer"])
        with explain, torch.set_grad_enabled(gradient):
            logits = model.eval()(torch.zeros(1, 3, size, size, dtype=first.dtype, device=first.device))
            if config["cam"] == "none":
                return None, None
            return explain.layer_name, explain(logits, rows=None if gradient else []).shape[1:]
    except Exception as error:  # as in build_network
        raise UserError(f"{what}: {short_reason(error)}") from None
    finally:
        model.train(training)


def pick_device(name):
    """The torch device that a setting names, a GPU with its index; auto is CUDA, then Apple's MPS, then the CPU.

    A GPU becomes the process's current one, by which events, pinned memory and limits go. Raises UserError, also for a
    GPU that this torch was not built for.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it computes nothing")
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
            _check_kernels(device)
            torch.cuda.set_device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch goes on about its builds behind the first sentence
        reason = short_reason(error).split(". ")[0]
        raise UserError(f"--device {name}: not to be had here ({reason}). Try --device cpu") from None
    return device


VOLTA = "torch 2.10.0 with torchvision 0.25.0 is the newest that does: README.md, Two commands, has the line"


def _check_kernels(device):
    """Raise UserError where torch has no kernels for a GPU: it would tell at the first one, in the middle of a run.

    Code for sm_XY runs on GPUs of the same X and at least Y; compute_XY is translated for any that is newer.
    """
    major, minor = torch.cuda.get_device_capability(device)
    built = re.findall(r"\b(sm|compute)_(\d+)\b", " ".join(torch.cuda.get_arch_list()))
    if built and not any(int(number) <= 10 * major + minor and (kind == "compute" or int(number) // 10 == major)
                         for kind, number in built):
        advice = VOLTA if major == 7 else "install a release that does, or take --device cpu"
        gpu, there = torch.cuda.get_device_name(device), ", ".join("_".join(each) for each in built)
        raise UserError(f"--device {device}: torch {torch.__version__} has no kernels for {gpu} (sm_{major}{minor}), "
                        f"only for {there}; {advice}")


def pick_amp(name, device):
    """A key of AMP, the dtype to autocast to. auto: bfloat16 where the GPU has it, else float16; off on a CPU.

    On a CPU without bfloat16 instructions autocast is many times slower than float32, and with them a small network
    gains nothing, so there it has to be asked for. Raises UserError for bfloat16 on a GPU without.
    """
    has_it = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        name = "off" if device.type != "cuda" else "bfloat16" if has_it else "float16"
    if name == "bfloat16" and not has_it:
        raise UserError(f"--amp bfloat16: {torch.cuda.get_device_name(device)} cannot. Begin a run with --amp float16; "
                        "one that began in bfloat16 goes on where there is a newer GPU, or with --device cpu, slowly")
    return name


AMP = {"off": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def set_switches(config, device):
    """torch's own switches, which are a process's and not a network's; before anything is computed on the device."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as convolutions have it by default
        torch.backends.cudnn.benchmark = not config["deterministic"]
    if config["deterministic"]:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config["deterministic"])
