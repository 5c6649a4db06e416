"""Scores generated images: FID, sFID, inception score, precision and recall, or a distance by a classifier.

    python -m experiments.score --images=samples.npz --inception=inception.safetensors --statistics=imagenet256.npz
    python -m experiments.score --images=samples.npz --classifier=runs/digits

The first needs the Inception-v3 of FID, as pytorch-fid and torch-fidelity have it, and the reference batch of the
evaluator that the field uses (such as VIRTUAL_imagenet256_labeled.npz). It takes mu, sigma, mu_s and sigma_s from that
file, and the images arr_0 for precision, recall and for moments that it lacks.

The second needs only a classifier that was trained with this code: the Frechet distance between its features of the
images and of its own data, and the share of images that it assigns to their label. This is not FID: compare it only
with numbers of the same classifier.

Both write SAMPLES.scores.json beside the images: numbers, settings of the images, hashes of all files.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags, logging
from tqdm import tqdm

from experiments import command_line
from gspn_jax import data, load_run
from gspn_jax.batching import batched
from gspn_jax.evaluation.scoring import Features, inception_features, score_by_classifier, score_by_inception
from gspn_jax.resuming import file_sha256
from gspn_jax.runs import ClassifierRun
from gspn_jax.training.checkpoints.fingerprint import sha256_of_arrays
from gspn_jax.weights.loading import load_inception


def with_inception(
    images: str, inception: str, statistics: str, *, batch_size: int = 50, splits: int = 10
) -> dict[str, Any]:
    """Returns the scores of `score_by_inception`, with the hashes of all files and the settings of the images.

    Args:
        images: .npz file of images.
        inception: file of the Inception-v3 of FID.
        statistics: .npz file of the reference.
        batch_size: images at a time.
        splits: parts of the images for the inception score.

    Raises:
        ValueError, OSError: a wrong argument or file; the message is one line.
    """
    sampling = _sampling(images)
    model, digest = load_inception(inception)
    scores = score_by_inception(images, statistics, inception_features(model, batch_size), splits=splits)
    files = {"statistics": _file(statistics), "inception": {"name": Path(inception).name, "sha256": digest}}
    return {"scores": scores, "files": files | {"images": _file(images)}, "sampling": sampling}


def with_classifier(
    images: str, workdir: str, *, split: str = "train", data_path: str = "", batch_size: int = 100
) -> dict[str, Any]:
    """Returns the scores of `score_by_classifier`, with the classifier, the hash of the file and its settings.

    Args:
        images: .npz file of images.
        workdir: of the classifier.
        split: "train" or "test" of its data.
        data_path: of its data, if they have moved.
        batch_size: images at a time.

    Raises:
        ValueError, OSError, CheckpointError: a wrong argument, file or checkpoint; the message is one line.
    """
    sampling = _sampling(images)
    run: ClassifierRun = load_run(workdir, task="classification")
    described = run.description["data"]
    side = described["image_size"]
    dataset = data.load(described["name"], data_path or described["path"] or None)
    batches = data.evaluation_batches(
        getattr(dataset, split),
        batch_size=batch_size,
        image_size=side,
        resize=described["resize"] or None,
        exif_rotation=described.get("exif_rotation", False),
    )
    try:
        reference = tqdm(batches, unit="batch", desc=f"{split} images")
        scores = score_by_classifier(images, reference, _features(run, batch_size), image_size=(side, side))
    finally:
        batches.close()
    classifier = {
        "workdir": str(workdir),
        "parameters": sha256_of_arrays(run.params),
        "step": run.step,
        "ema": run.parameters == "ema",
        "data": described["name"],
        "split": split,
        "reference_images": scores.pop("reference_images"),
    }
    return {"scores": scores, "classifier": classifier, "files": {"images": _file(images)}, "sampling": sampling}


def _features(run: ClassifierRun, batch_size: int) -> Features:
    """Returns images uint8 (B, H, W, 3) -> features and logits of a classifier."""

    def compute(params: Any, images: jax.Array) -> dict[str, jax.Array]:
        features = {"features": run.task.features(params, images), "logits": run.task.logits(params, images)}
        return {name: value.astype(jnp.float32) for name, value in features.items()}

    return batched(compute, run.params, batch_size)


def _file(path: str) -> dict[str, str]:
    return {"name": Path(path).name, "sha256": file_sha256(path)}


def _sampling(images: str) -> dict[str, Any] | None:
    """Returns the settings that `experiments.sample` wrote beside the images."""
    path = Path(images).with_suffix(".json")
    try:
        return json.loads(path.read_text()) if path.is_file() else None
    except ValueError as error:
        raise ValueError(f"images: expected JSON in {path}, the settings of the images, got {error}") from error


def define_flags() -> None:
    flags.DEFINE_string("images", None, "An .npz file of images arr_0, uint8 (N, H, W, 3).", required=True)
    flags.DEFINE_string("inception", "", "File of the Inception-v3 of FID.")
    flags.DEFINE_string("statistics", "", "The reference's .npz file: mu, sigma, mu_s, sigma_s, arr_0.")
    flags.DEFINE_string("classifier", "", "Workdir of a classifier, for a distance that is not FID.")
    flags.DEFINE_enum("split", "train", ["train", "test"], "The classifier's data to compare with.")
    flags.DEFINE_string("data_path", "", "Path of the classifier's data, if they have moved.")
    flags.DEFINE_integer("batch_size", 50, "Images at a time.", lower_bound=1)


def main() -> None:
    chosen = flags.FLAGS
    if bool(chosen.inception) != bool(chosen.statistics) or bool(chosen.inception) == bool(chosen.classifier):
        raise ValueError("inception, statistics, classifier: expected the first two, or only the last")
    if chosen.classifier:
        options: Any = dict(split=chosen.split, data_path=chosen.data_path, batch_size=chosen.batch_size)
        results = with_classifier(chosen.images, chosen.classifier, **options)
    else:
        results = with_inception(chosen.images, chosen.inception, chosen.statistics, batch_size=chosen.batch_size)
    path = Path(chosen.images).with_suffix(".scores.json")
    text = json.dumps(results, indent=2, allow_nan=False) + "\n"
    print(*(f"{name}: {value:.6g}" for name, value in results["scores"].items()), sep="\n", flush=True)
    try:
        path.write_text(text)
    except OSError as error:
        logging.warning("%s is not written: %s", path, error.strerror or error)
    else:
        print(f"written: {path}")


if __name__ == "__main__":
    command_line.start(main, define_flags)
