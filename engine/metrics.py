"""Figures of a run: how good its predictions are, by class and by group, and what the run cost.

Everything here follows from arrays and from the lines of `log.jsonl`: no network, no image, no file.
"""

import numpy as np
from scipy import special

PREDICTED = ("val", "test", "clean_test")  # the last under --decoy: the test without decoys
LEAK = "validation images have been trained on; validation accuracy means nothing for new images"
ECE_BINS = 15  # as Guo et al. 2017


def softmax(logits):
    """Probabilities float64 [N, C] of logits [N, C]; in float32 the sums would be 1 to six digits only."""
    return special.softmax(logits.astype(np.float64), axis=1)


def calibration(confidence, correct):
    """Images, sum of confidence and number of correct ones, each [ECE_BINS], in bins of equal width.

    confidence: float [N] in (0, 1], of the predicted class. correct: bool [N].
    """
    place = np.minimum((confidence * ECE_BINS).astype(int), ECE_BINS - 1)
    return tuple(np.bincount(place, weights, ECE_BINS) for weights in (None, confidence, correct))


def expected_calibration_error(confidence, correct):
    """Guo et al. 2017, equation 3: mean over the bins of `calibration` of |accuracy - confidence|, weighted by size."""
    sizes, confident, right = calibration(confidence, correct)
    return float(np.abs(right - confident).sum() / sizes.sum())


def metrics(labels, logits, classes):
    """The figures of one part of the split, as `metrics.json` has them.

    labels: int [N]. logits: float [N, C]. classes: C names. Averages called macro are over all classes, absent ones
    counting as 0; balanced_accuracy leaves absent ones out. top5: None for up to 5 classes. brier: sum over classes of
    squared differences, mean over images, in [0, 2] (Brier 1950).
    """
    import sklearn.metrics as known  # which takes a second, that no dry run should wait for

    probabilities, predicted, every = softmax(logits), logits.argmax(1), np.arange(len(classes))
    each = known.precision_recall_fscore_support(labels, predicted, labels=every, zero_division=0)
    precision, recall, f1, support = each
    return {
        "images": len(labels),
        "accuracy": float(known.accuracy_score(labels, predicted)),
        "balanced_accuracy": float(recall[support > 0].mean()),  # scikit-learn's warns where a class is absent
        "precision_macro": float(precision.mean()),
        "recall_macro": float(recall.mean()),
        "f1_macro": float(f1.mean()),
        "top5": float(known.top_k_accuracy_score(labels, logits, k=5, labels=every)) if len(classes) > 5 else None,
        "log_loss": float(known.log_loss(labels, probabilities, labels=every)),
        "brier": float(np.mean(np.sum((probabilities - np.eye(len(classes))[labels]) ** 2, axis=1))),
        "ece": expected_calibration_error(probabilities.max(1), predicted == labels),
        "per_class": {name: {"precision": float(precision[i]), "recall": float(recall[i]), "f1": float(f1[i]),
                             "images": int(support[i])} for i, name in enumerate(classes)},
    }


def group_metrics(labels, logits, groups, classes):
    """Accuracy of each class within each group, and the lowest of these (Sagawa et al. 2020: the one to watch).

    groups: [N] bytes, the groups' names. Returns {"CLASS, GROUP": {"images", "accuracy"}} and that lowest accuracy.
    """
    found, right = {}, logits.argmax(1) == labels
    for group, c in sorted(set(zip(groups, labels))):
        inside = right[(groups == group) & (labels == c)]
        name = f"{classes[c]}, {group.decode('utf-8', 'surrogateescape')}"
        found[name] = {"images": len(inside), "accuracy": float(inside.mean())}
    return found, min(each["accuracy"] for each in found.values())


def costs(log, prediction_seconds, erasing=()):
    """What a run cost: sums over its epochs, and of memory the peaks. None where the machine cannot measure it.

    log: the lines of `log.jsonl`. erasing: what lies between epochs, each with seconds, energy_wh and images: lines of
    `stages.jsonl` for each stage 2, or `snapshot.json`. Its seconds count as training and as heat. energy_wh: of
    training, from counters of the hardware; None where one of these has none. second_pass_images: images that went
    through the network once more, for their heat alone.
    """
    erasing_seconds = sum(line["seconds"] for line in erasing)

    def total(key):
        return sum(line[key] for line in log)

    energies = [line["energy_wh"] for line in (*log, *erasing)]
    seconds = total("train_seconds") + erasing_seconds
    return {
        "train_seconds": round(seconds, 3),
        "cam_seconds": round(total("cam_seconds") + erasing_seconds, 3),
        "eval_seconds": round(total("eval_seconds") + prediction_seconds, 3),
        "images_seen": total("images_seen"),
        "erased_images": total("erased_images"),
        "second_pass_images": total("second_pass_images") + sum(line["images"] for line in erasing),
        "optimizer_steps": total("optimizer_steps"),
        "skipped_steps": total("skipped_steps"),
        "images_per_second": round(total("images_seen") / seconds, 2) if seconds else None,
        **{key: max((line[key] for line in log if line[key] is not None), default=None)
           for key in ("peak_gpu_allocated_mb", "peak_gpu_reserved_mb", "peak_host_mb")},
        "energy_wh": None if None in energies else round(sum(energies), 4),
    }


def best_epoch(log):
    """Number of the epoch with the highest validation accuracy; of equals, the one with the lowest validation loss."""
    return max(range(len(log)), key=lambda i: (log[i]["val_accuracy"], -log[i]["val_loss"])) + 1
