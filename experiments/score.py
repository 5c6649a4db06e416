"""Scores generated images: FID, sFID, inception score, precision and recall; or a Frechet distance of our own features.

    python -m experiments.score --images=samples.npz --inception=inception.safetensors --statistics=imagenet256.npz
    python -m experiments.score --images=samples.npz --classifier=runs/digits

The first takes the Inception-v3 of FID, as pytorch-fid and torch-fidelity have it, converted to safetensors, and a
reference batch of the evaluator that the field uses (such as VIRTUAL_imagenet256_labeled.npz): its `mu`, `sigma`,
`mu_s` and `sigma_s` where it has them, and its images `arr_0` for precision and recall, and for what it lacks.

The second is for where these are not at hand: the Frechet distance of what a classifier that was trained here sees, to
the images it was trained on, and the share of images that it takes for their label. It is no FID, and compares with
nothing but other numbers of the same classifier.

Both write their numbers, with the settings of the images and the hashes of all files, beside the images as
SAMPLES.scores.json.
"""

import functools
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from tqdm import tqdm

from experiments import classification, command_line, provenance
from experiments.image_batches import LABELS, image_blocks, image_count, sha256
from gspn_jax import data
from gspn_jax.evaluation.frechet import (
    Moments,
    RunningInceptionScore,
    RunningMoments,
    frechet_distance,
    precision_and_recall,
)
from gspn_jax.training import load_parameters
from gspn_jax.training.sharding import local_mesh, place_batch
from gspn_jax.weights import fid_inception, read_arrays

Extract = Callable[[np.ndarray], dict[str, np.ndarray]]  # images uint8 (B, H, W, 3) to features (B, D) by name
POOLED, SPATIAL, LOGITS = "2048", "mixed_6_conv", "logits_unbiased"


def batched(compute: Callable[..., dict[str, jax.Array]], state: Any, batch_size: int) -> Extract:
    """A function of parameters and images as one of images, in batches of one size on this process's devices."""
    mesh = local_mesh()
    size = -(-batch_size // mesh.size) * mesh.size
    state = jax.device_put(state, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    compiled = jax.jit(compute)

    def extract(images: np.ndarray) -> dict[str, np.ndarray]:
        found = []
        for start in range(0, len(images), size):
            part = images[start : start + size]
            padded = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
            with jax.set_mesh(mesh):
                features = compiled(state, place_batch({"images": padded}, mesh)["images"])
            found.append({name: np.asarray(value)[: len(part)] for name, value in features.items()})
        return {name: np.concatenate([part[name] for part in found]) for name in found[0]}

    return extract


def with_inception(
    images: str, inception: str, statistics: str, *, batch_size: int = 50, splits: int = 10
) -> dict[str, Any]:
    """FID, sFID, inception score, precision and recall of a file of images against one of a reference.

    Raises:
        ValueError, OSError: in one line, what is wrong.
    """
    count, sampling = _counted(images), _sampling(images)
    given, has_images = _given_moments(statistics), _has_images(statistics)
    if POOLED not in given and not has_images:
        raise ValueError(f"statistics: expected mu and sigma, or images arr_0, got none of them in {statistics}")
    if count < splits:
        raise ValueError(f"images: expected at least {splits} in {images}, got {count}")
    arrays = read_arrays(inception, argument="inception")
    try:
        graph, state = nnx.split(fid_inception(arrays))
    except ValueError as error:
        raise ValueError(f"inception: {inception}: {error}") from error

    def compute(state: Any, images: jax.Array) -> dict[str, jax.Array]:
        features = nnx.merge(graph, state)(images)
        spatial = features[SPATIAL].reshape(len(images), -1)
        return {POOLED: features[POOLED], SPATIAL: spatial, LOGITS: features[LOGITS]}

    extract = batched(compute, state, batch_size)
    running = RunningInceptionScore(count, splits)

    def extract_and_score(images: np.ndarray) -> dict[str, np.ndarray]:
        features = extract(images)
        running.add(features[LOGITS])
        return features

    kept = (POOLED,) if has_images else ()  # precision and recall compare features
    found = _seen(images, extract_and_score, moments=(POOLED, SPATIAL), kept=kept)
    mean, deviation = running.score()
    scores: dict[str, Any] = {"images": count}
    reference: tuple[dict[str, Moments], dict[str, np.ndarray]] = ({}, {})
    if has_images:
        reference = _seen(statistics, extract, moments={POOLED, SPATIAL} - set(given), kept=kept)
    moments = reference[0] | given
    scores["fid"] = frechet_distance(found[0][POOLED], moments[POOLED])
    if SPATIAL in moments:
        scores["sfid"] = frechet_distance(found[0][SPATIAL], moments[SPATIAL])
    scores |= {"inception_score": mean, "inception_score_deviation": deviation}
    if reference[1]:
        near = precision_and_recall(reference[1][POOLED], found[1][POOLED])
        scores |= dict(zip(("precision", "recall"), near, strict=True))
    files = {"statistics": _file(statistics), "inception": _file(inception)}
    return {"scores": scores, "files": files | {"images": _file(images)}, "sampling": sampling}


def with_classifier(
    images: str, workdir: str, *, split: str = "train", data_path: str = "", batch_size: int = 100
) -> dict[str, Any]:
    """The Frechet distance of a classifier's features to those of its own data, and how many labels it recognises.

    Args:
        split: "train" or "test", of the data.
        data_path: where they are, if elsewhere than in the run.

    Raises:
        ValueError, OSError, CheckpointError: in one line, what is wrong.
    """
    count, labels, sampling = _counted(images), _labels(images), _sampling(images)
    params, meta = load_parameters(workdir)
    task = classification.make_task(meta)
    side = meta["data"]["image_size"]
    dataset = data.load(meta["data"]["name"], data_path or meta["data"]["path"] or None)

    def compute(params: Any, images: jax.Array) -> dict[str, jax.Array]:
        features = {"features": task.features(params, images), "logits": task.logits(params, images)}
        return {name: value.astype(jnp.float32) for name, value in features.items()}

    extract = batched(compute, jax.tree.map(jnp.asarray, params), batch_size)
    found, kept = _seen(images, extract, moments=("features",), kept=("logits",), shape=(side, side, 3))
    batches = data.evaluation_batches(
        getattr(dataset, split), batch_size=batch_size, image_size=side, resize=meta["data"]["resize"] or None
    )
    reference = RunningMoments(len(found["features"][0]))
    for batch in tqdm(batches, unit="batch", desc=f"{split} images"):
        reference.add(extract(batch["image"])["features"][batch["mask"]])
    scores: dict[str, Any] = {
        "images": count,
        "classifier_frechet_distance": frechet_distance(found["features"], reference.moments()),
    }
    if labels is not None:
        scores["recognised"] = float((kept["logits"].argmax(-1) == labels).mean())
    parameters = provenance.sha256_of_arrays(params)
    classifier = {
        "workdir": str(workdir),
        "parameters": parameters,
        "step": meta["step"],
        "ema": meta["ema"],
        "data": meta["data"]["name"],
    }
    return {
        "scores": scores,
        "classifier": classifier | {"split": split, "reference_images": reference.count},
        "files": {"images": _file(images)},
        "sampling": sampling,
    }


def _seen(
    path: str,
    extract: Extract,
    *,
    moments: Iterable[str],
    kept: Sequence[str],
    shape: tuple[int, ...] | None = None,
) -> tuple[dict[str, Moments], dict[str, np.ndarray]]:
    """Moments of some features, and all rows of others, of a file's images."""
    sums: dict[str, RunningMoments] = {}
    rows: dict[str, list[np.ndarray]] = {name: [] for name in kept}
    for block in tqdm(_checked(path, shape), unit="block", desc=Path(path).name):
        features = extract(block)
        for name in moments:
            sums.setdefault(name, RunningMoments(features[name].shape[1])).add(features[name])
        for name in kept:
            rows[name].append(features[name])
    return (
        {name: total.moments() for name, total in sums.items()},
        {name: np.concatenate(parts) for name, parts in rows.items()},
    )


def _checked(path: str, shape: tuple[int, ...] | None) -> Iterator[np.ndarray]:
    for block in image_blocks(path, 500):
        if shape is not None and block.shape[1:] != shape:
            raise ValueError(f"images: expected shape {shape}, as the classifier's, got {block.shape[1:]}")
        yield block


def _given_moments(path: str) -> dict[str, Moments]:
    """Moments that a file of statistics holds."""
    try:
        with np.load(path) as file:
            pairs = ((POOLED, "mu", "sigma"), (SPATIAL, "mu_s", "sigma_s"))
            return {name: (file[mu], file[sigma]) for name, mu, sigma in pairs if mu in file and sigma in file}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"statistics: expected an .npz file, got {path}: {error}") from error


def _has_images(path: str) -> bool:
    with np.load(path) as file:
        return "arr_0" in file.files


@functools.cache
def _file(path: str) -> dict[str, str]:
    return {"name": Path(path).name, "sha256": sha256(path)}


def _counted(images: str) -> int:
    count = image_count(images)
    if count < 2:
        raise ValueError(f"images: expected at least 2 in {images}, got {count}")
    return count


def _labels(images: str) -> np.ndarray | None:
    """Of each image, where the file has them."""
    with np.load(images) as file:
        labels = file[LABELS] if LABELS in file else None
    if labels is not None and labels.shape != (count := image_count(images),):
        raise ValueError(f"images: expected {LABELS} of shape {(count,)} in {images}, got {labels.shape}")
    return labels


def _sampling(images: str) -> dict[str, Any] | None:
    """What `experiments.sample` wrote beside the images."""
    path = Path(images).with_suffix(".json")
    try:
        return json.loads(path.read_text()) if path.is_file() else None
    except ValueError as error:
        raise ValueError(f"images: expected JSON in {path}, how they were made; got {error}") from error


def define_flags() -> None:
    flags.DEFINE_string("images", None, "An .npz file of images arr_0, uint8 (N, H, W, 3).", required=True)
    flags.DEFINE_string("inception", "", "Safetensors file of the Inception-v3 of FID.")
    flags.DEFINE_string("statistics", "", "The reference's .npz file: mu, sigma, mu_s, sigma_s, arr_0.")
    flags.DEFINE_string("classifier", "", "Workdir of a classifier, for a distance that is no FID.")
    flags.DEFINE_enum("split", "train", ["train", "test"], "Of the classifier's data, what images are compared with.")
    flags.DEFINE_string("data_path", "", "Where the classifier's data are, if elsewhere than in its run.")
    flags.DEFINE_integer("batch_size", 50, "Images at a time.", lower_bound=1)


def main(argv: Sequence[str]) -> None:
    if argv:
        raise ValueError(f"expected flags only, got {' '.join(argv)}")
    chosen = flags.FLAGS
    if bool(chosen.inception) != bool(chosen.statistics) or bool(chosen.inception) == bool(chosen.classifier):
        raise ValueError("inception, statistics, classifier: expected the first two, or the last")
    if chosen.classifier:
        options: Any = dict(split=chosen.split, data_path=chosen.data_path, batch_size=chosen.batch_size)
        results = with_classifier(chosen.images, chosen.classifier, **options)
    else:
        results = with_inception(chosen.images, chosen.inception, chosen.statistics, batch_size=chosen.batch_size)
    path = Path(chosen.images).with_suffix(".scores.json")
    path.write_text(json.dumps(results, indent=2) + "\n")
    print(*(f"{name}: {value:.6g}" for name, value in results["scores"].items()), f"written: {path}", sep="\n")


if __name__ == "__main__":
    command_line.start(main, define_flags)
