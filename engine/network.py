"""The network of a run, and the device it runs on: built by timm, with weights from timm or from a file.

    device = pick_device("auto")                           # with its index, and its kernels there
    model, text = build_network(config, classes=29)        # on the CPU; text: what its weights are
    layer, grid = try_network(config, model)               # does it fit image size, method and layer?
"""

import contextlib
import os
import re
import urllib.error
import urllib.request
from pathlib import Path

import torch

import cam
from engine.files import UserError, short_reason


def build_network(config, classes, pretrained=True):
    """The network of a resolved config, on the CPU, and a text on the weights that it starts with.

    classes: number of outputs. pretrained: False for a network whose weights will be loaded from a checkpoint anyway.
    Returns (model, text). Raises UserError where the weights cannot be had.
    """
    import timm

    name, arguments = config["model_entry"]["timm"], dict(config["model_entry"].get("arguments", {}))
    known = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
    if known is not None and known.fixed_input_size:
        arguments["img_size"] = config["image_size"]
    weights = config["weights"] if pretrained else None
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
        given = f" with {arguments}" if arguments else ""
        raise UserError(f"timm cannot build {name}{given}: {short_reason(error)}. Try another --image-size or "
                        "--model") from None
    if weights:
        text = load_weights(model, weights)
    return model, text


def head_names(config, model, classes):
    """The tensors whose shape depends on the number of classes, the head or heads: {name: the axis that does}."""
    with torch.device("meta"):
        larger = build_network(config, classes + 1, pretrained=False)[0].state_dict()
    axes = {name: [i for i, (a, b) in enumerate(zip(tensor.shape, larger[name].shape)) if a != b]
            for name, tensor in model.state_dict().items()}
    return {name: axis[0] for name, axis in axes.items() if axis}


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
    try:
        request = urllib.request.Request(huggingface_hub.constants.ENDPOINT, method="HEAD")
        urllib.request.urlopen(request, timeout=10).close()
    except urllib.error.HTTPError:
        pass  # it answered
    except OSError as error:
        raise UserError(_no_hub(name, getattr(error, "reason", error))) from None


def _no_hub(name, reason):
    return (f"the pretrained weights of {name} cannot be fetched ({reason}). Give a local file with --weights FILE "
            "(.safetensors or .pth), or train from random weights with --no-pretrained")


def read_weights(path):
    """{name: tensor} of a `.safetensors` or `.pth` file; executes nothing in it. Raises UserError."""
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"--weights {path}: no such file") from None
    except Exception as error:  # both libraries raise many kinds for what is not such a file
        reason = "it holds more than tensors, and loading it could run code" if "weights_only" in str(error) \
            else short_reason(error)
        raise UserError(f"--weights {path}: cannot be loaded ({reason}). Expected a .safetensors file, or a .pth file "
                        "of tensors alone") from None
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict):
        raise UserError(f"--weights {path}: holds {type(found).__name__}, not named tensors")
    return {str(k).removeprefix("module.").removeprefix("_orig_mod."): v for k, v in found.items()
            if isinstance(v, torch.Tensor)}


def load_weights(model, path):
    """Load what fits of a `.safetensors` or `.pth` file into `model`; returns a text with the rest, or UserError."""
    found, own = read_weights(path), model.state_dict()
    fits = {k: v for k, v in found.items() if k in own and own[k].shape == v.shape}
    if not fits:
        raise UserError(f"--weights {path}: none of its {len(found)} tensors fits {type(model).__name__}, whose first "
                        f"is {next(iter(own))} {list(next(iter(own.values())).shape)}")
    model.load_state_dict(fits, strict=False)
    lines = [f"starts from {path}: {len(fits)} of {len(own)} tensors"]
    lines += [f"  left out {k}: {list(v.shape)} in the file, {list(own[k].shape)} in the network"
              for k, v in found.items() if k in own and k not in fits]
    lines += [f"  left out {k}: the network has no such tensor" for k in found if k not in own]
    lines += [f"  not in the file, so random: {k}" for k in own if k not in found]
    return "\n".join(lines)


def classes_of_weights(config):
    """Number of classes that the weights of a config were trained for: the file's head shows it, or else timm."""
    import timm

    known = timm.models.get_pretrained_cfg(config["model_entry"]["timm"], allow_unregistered=True)
    if config["weights"] and known is not None and isinstance(known.classifier, str):
        head = read_weights(config["weights"]).get(f"{known.classifier}.weight")
        if head is not None:
            return len(head)
    return known.num_classes if known is not None else 1000


def normalisation(config, model):
    """(mean, std) [1, 3, 1, 1] for values in [0, 1]: the dataset's, or those that the network was pretrained with."""
    given = config["dataset_entry"]["normalisation"]
    if given == "network":
        given = {key: getattr(model, "pretrained_cfg", {}).get(key) or fallback for key, fallback in
                 (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225)))}  # ImageNet's
    return tuple(torch.tensor(given[key], dtype=torch.float32).view(1, 3, 1, 1) for key in ("mean", "std"))


def try_network(config, model):
    """One forward pass, in eval mode, that shows whether network, image size, method and layer fit together.

    Returns name and grid (h, w) of the explained layer, or (None, None) for --cam none. The model stays as it was.
    """
    explain = contextlib.nullcontext()
    size, training, first = config["image_size"], model.training, next(model.parameters())
    what = f"{config['model']} with images of {size}x{size}"
    try:
        if config["cam"] != "none":
            what = f"--cam {config['cam']} with {what}"
            explain = cam.CAM(model, config["cam"], config["layer"])
        with explain, torch.no_grad():
            logits = model.eval()(torch.zeros(1, 3, size, size, dtype=first.dtype, device=first.device))
            return (None, None) if config["cam"] == "none" else (explain.layer_name, explain(logits, rows=[]).shape[1:])
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
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
            _check_kernels(device)
            torch.cuda.set_device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not to be had here ({short_reason(error)}). Try --device cpu") from None
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
