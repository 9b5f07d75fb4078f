"""The command line: `maskloss` and `python -m maskloss`.

Each command is a function here; its options are the function's parameters, and those of `train` the fields
of `TrainConfig`. An error is one line on stderr. The exit code is 2 for bad arguments or input, and 1 for a run
that failed or a check that found errors.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from maskloss.errors import TERMINATING, InputError, RunError, interrupt_by_exception, one_line
from maskloss.files import with_home
from maskloss.screen import messages_on_screen

if TYPE_CHECKING:
    from maskloss.parser import Parser

logger = logging.getLogger(__name__)

#: Errors of a path that is wrong, not of a disk or a network.
_BAD_PATH = {errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.EINVAL}
#: Largest number of categories in the table of a terminal.
_MOST_CLASSES = 30
#: Maximum length in characters of a line of `check`, which shows up to three examples.
_REPORT_LENGTH = 800


def demo(output: str = "runs/demo", max_steps: int = 260, seed: int = 0, device: str = "auto") -> None:
    """Train a small Mask R-CNN on synthetic shapes, evaluate it and write a report.

    An interrupted demo resumes where it stopped.

    Args:
        output: folder of the run; the data are written to data/ in it.
        max_steps: number of optimizer steps.
        seed: random seed of the data and the training.
        device: device to train on, such as "cpu", "cuda" or "cuda:1"; "auto" is CUDA if available, otherwise the CPU.
    """
    from maskloss.data.shapes import write_shapes
    from maskloss.training.config import TrainConfig

    if not 0 <= seed < 2**61:
        raise InputError(f"--seed must be at least 0 and below 2^61, got {one_line(seed, 80)}")
    folder = Path(output)
    # Before the data are written, because it checks the options.
    config = TrainConfig(
        train_images=str(folder / "data/train/images"),
        train_annotations=str(folder / "data/train/annotations.json"),
        val_images=str(folder / "data/val/images"),
        val_annotations=str(folder / "data/val/annotations.json"),
        output=output,
        model="resnet18",
        loss="aligned",
        max_steps=max_steps,
        batch_size=8,
        optimizer="adamw",
        learning_rate=5e-4,
        weight_decay=1e-3,
        warmup_steps=20,
        schedule="cosine",
        min_size=128,
        max_size=128,
        seed=seed,
        log_every=10,
        workers=1,
        checkpoint_every=50,
        evaluate_every=max(max_steps // 2, 1),
        device=device,
        resume=True,
    )
    for name, num_images, offset in (("train", 512, 0), ("val", 96, 1)):
        part = folder / "data" / name
        # The annotation file is written last, so the data are complete if it exists.
        if not (part / "annotations.json").exists():
            if part.exists() and any(part.glob("*")):
                raise InputError(
                    f"{part}: contains an incomplete data set; remove it, or name another --output"
                )
            write_shapes(part, num_images, size=128, seed=2 * seed + offset)
    _train_and_report(config)


def shapes(output: str, images: int, size: int = 128, seed: int = 0) -> None:
    """Write synthetic COCO-format data: images of circles, rectangles and triangles.

    Args:
        output: new folder for images/ and annotations.json.
        images: number of images to write.
        size: side length of each image in px.
        seed: random seed; the same seed makes the same images.
    """
    from maskloss.data.shapes import write_shapes

    if not 0 <= seed < 2**63:
        raise InputError(f"--seed must be at least 0 and below 2^63, got {one_line(seed, 80)}")
    if size > 16_384:
        raise InputError(f"--size must be at most 16,384 px, got {one_line(size, 80)}")
    write_shapes(output, images, size=size, seed=seed)
    print(f"{output}: {images} images of {size} x {size} px")


def check(images: str, annotations: str, all: bool = False) -> None:
    """Check a data set for problems that would break or distort training; exit with 1 if there are errors.

    Args:
        images: folder of the images.
        annotations: COCO-format JSON file.
        all: list every case of each problem instead of three examples.
    """
    from maskloss.data.check import check_data

    data, problems = check_data(images, annotations, progress=True)
    for problem in problems:
        print(one_line(problem, _REPORT_LENGTH))
        if all and len(problem.examples) > 1:
            for example in problem.examples:
                print("  " + one_line(example, _REPORT_LENGTH))
    errors = sum(problem.error for problem in problems)
    if data is not None:
        _print_contents(data)
    print(f"{errors} errors, {len(problems) - errors} warnings")
    if errors:
        sys.exit(1)


def repair(
    images: str,
    annotations: str,
    output: str,
    crowds: Literal["keep", "objects"] = "keep",
    boxes: Literal["keep", "from-masks"] = "keep",
) -> None:
    """Write an annotation file without errors, and list every change and removal.

    Args:
        images: folder of the images.
        annotations: COCO-format JSON file to repair, which is not modified.
        output: new annotation file; the list of repairs is written beside it, as NAME.repairs.json for NAME.json.
        crowds: "objects" turns each crowd into an object, for annotation tools that write brush masks as crowds.
        boxes: "from-masks" computes the boxes from the masks.
    """
    from maskloss.data import repair as repairing

    data, repairs = repairing.repair(images, annotations, output, crowds=crowds, boxes=boxes)
    for line in repairs:
        print(line)
    if not repairs:
        print("nothing to repair")
    _print_contents(data)
    print(output)


def subset(
    images: str,
    annotations: str,
    output: str,
    images_per_class: int | None = None,
    max_images: int | None = None,
    fraction: float | None = None,
    rest: str | None = None,
    categories: str | None = None,
) -> None:
    """Copy a subset of a COCO-format data set.

    Args:
        images: folder of the images.
        annotations: COCO-format JSON file.
        output: new folder for images/ and annotations.json.
        images_per_class: take images until each category is in at least this many of them, as far as the data allow.
        max_images: take at most this many images.
        fraction: take this share of the images, above 0 and below 1, with the same share of each category's images.
        rest: new folder for the images that --fraction leaves.
        categories: comma-separated names of the categories to keep, with the images that have objects of them.
    """
    from maskloss.data.subset import write_subset

    names = None if categories is None else [name.strip() for name in categories.split(",")]
    data = write_subset(
        images,
        annotations,
        output,
        images_per_class=images_per_class,
        max_images=max_images,
        fraction=fraction,
        rest=rest,
        categories=names,
    )
    for warning in data.warnings:
        logger.warning("%s", warning)
    print(
        f"{output}: {len(data.images)} images, {data.num_objects} objects, {len(data.categories)} categories"
    )


def train(**options: Any) -> None:
    """Train a Mask R-CNN on COCO-format data, evaluate it and write a report."""
    from maskloss.training.config import TrainConfig

    _train_and_report(TrainConfig(**options))


def find_lr(steps: int = 100, lowest: float = 1e-6, highest: float = 1.0, **options: Any) -> None:
    """Search for a learning rate: train for some steps while it rises, and show where the loss stops falling.

    Args:
        steps: number of steps, at least 10.
        lowest: learning rate of the first step.
        highest: learning rate of the last step. The search ends earlier if the loss rises to three times its minimum.
        options: the options of `train`; the search writes learning_rate.svg into `output`.
    """
    from maskloss.files import make_folder, write_text
    from maskloss.report.curves import learning_rate_curve
    from maskloss.training.config import TrainConfig
    from maskloss.training.learning_rate import find_learning_rate

    config = TrainConfig(**options)
    search = find_learning_rate(config, steps=steps, lowest=lowest, highest=highest)
    make_folder(config.output_folder)
    picture = config.output_folder / "learning_rate.svg"
    write_text(picture, learning_rate_curve(search.rates, search.losses, search.smoothed, search.suggestion))
    print(f"suggestion: --learning-rate {search.suggestion:.2g}; {picture} shows the losses")


def evaluate(
    checkpoint: str,
    images: str,
    annotations: str,
    output: str,
    loss: str | dict[str, Any] | None = None,
    model: str | None = None,
    mask_branch: str | None = None,
    batch_size: int = 2,
    max_detections: int | None = None,
    device: str = "auto",
) -> None:
    """Compute the losses of a trained model, and its AP for boxes, masks and boundaries.

    The losses are those that the model was trained with, read from its file. If that names user code, the losses are
    computed only if `loss` names it too: code is not imported just because a file says so.

    Args:
        checkpoint: model file, or folder of a run: its best model, or its newest if it was not evaluated yet.
        images: folder of the images.
        annotations: COCO-format JSON file.
        output: folder for metrics.json and results.json.
        loss: loss to compute, as a preset, an import path or a JSON mapping. If omitted: the one in the model file.
        model: import path of the model, required if user code builds it.
        mask_branch: import path of the mask branch, required if user code builds it.
        batch_size: number of images to load at a time.
        max_detections: maximum number of detections per image. AP counts at most this many per image and category.
            If omitted: the model's own.
        device: device to run on, such as "cpu", "cuda" or "cuda:1"; "auto" is CUDA if available, otherwise the CPU.
    """
    from maskloss.data.coco import read_coco
    from maskloss.files import locked, make_folder, write_text
    from maskloss.training import evaluation
    from maskloss.training.metrics import write_metrics
    from maskloss.training.model_file import load_model
    from maskloss.training.setup import chosen_device

    if not 1 <= batch_size <= 100_000:
        raise InputError(f"--batch-size must be in 1 to 100,000, got {one_line(batch_size, 80)}")
    chosen = chosen_device(device)
    loaded = load_model(
        checkpoint, loss=loss, max_detections=max_detections, model=model, mask_branch=mask_branch
    )
    data = read_coco(images, annotations, categories=loaded.description.categories)
    folder = Path(output)
    for name in ("metrics.json", "results.json"):
        _refuse_to_overwrite(folder / name)
    make_folder(folder)
    with locked(folder):
        for warning in data.warnings:
            logger.warning("%s", warning)
        evaluation.warn_of_crowded_images(data, loaded.description.settings.max_detections)
        if loaded.loss_config is None:
            own = loaded.description.loss
            print(
                "no losses: the model's file does not say which loss it was trained with; give --loss"
                if own is None
                else f"no losses: the model was trained with {own if isinstance(own, str) else 'user code'}, "
                "which is imported only if it is given by --loss",
                file=sys.stderr,
            )
        found = evaluation.evaluate(
            loaded.model.to(chosen),
            data,
            batch_size=batch_size,
            device=chosen,
            losses=loaded.loss_config is not None,
            crowds=loaded.description.crowds,
        )
        write_text(folder / "results.json", json.dumps(found.results))
        write_metrics(folder / "metrics.json", found.metrics)
    _print_metrics(found.metrics)
    print(folder / "metrics.json")


def predict(
    image: list[str],
    checkpoint: str,
    output: str,
    score_threshold: float | None = None,
    tile: int | None = None,
    crops: bool = False,
    label_maps: bool = False,
    max_detections: int | None = None,
    loss: str | None = None,
    model: str | None = None,
    mask_branch: str | None = None,
    device: str = "auto",
) -> None:
    """Predict objects in images: pictures of their masks, COCO results, and a table.

    Args:
        image: images, folders of images, or patterns such as "photos/*.jpg".
        checkpoint: model file, or folder of a run: its best model, or its newest if it was not evaluated yet.
        output: folder for a PNG per image, results.json in COCO's results format, and objects.csv with the category,
            score, box, area and perimeter of each object.
        score_threshold: minimum score of a detection, in [0, 1]. If omitted: each category's score with the best F1 in
            the evaluation of the model, or 0.5 if it was not evaluated.
        tile: cut images into overlapping tiles with sides of this many px, at least 64, for objects that are small in
            large images.
        crops: write a PNG of each object with a transparent background, in crops/.
        label_maps: write a 16-bit PNG per image whose values are the objects' numbers in objects.csv, in labels/.
        max_detections: maximum number of detections per image or tile. If omitted: the model's own.
        loss: import path of the model's loss, required if a user's mask term computes the masks.
        model: import path of the model, required if user code builds it.
        mask_branch: import path of the mask branch, required if user code builds it.
        device: device to run on, such as "cpu", "cuda" or "cuda:1"; "auto" is CUDA if available, otherwise the CPU.
    """
    from maskloss.files import check_unused, locked, make_folder
    from maskloss.report.predicted import PredictedFiles, picture_names
    from maskloss.training import prediction
    from maskloss.training.model_file import load_model
    from maskloss.training.setup import chosen_device

    if score_threshold is not None and not 0 <= score_threshold <= 1:
        raise InputError(f"--score-threshold must be in [0, 1], got {score_threshold}")
    if tile is not None and not 64 <= tile <= 65_535:
        raise InputError(f"--tile must be in 64 to 65,535 px, got {one_line(tile, 80)}")
    chosen = chosen_device(device)
    loaded = load_model(
        checkpoint, loss=loss, max_detections=max_detections, model=model, mask_branch=mask_branch
    )
    description = loaded.description
    folder = Path(output)
    files = prediction.image_files(image)
    pictures = picture_names(files)
    # The folder may be the one that contains the photos.
    maps = [f"labels/{name}" for name in pictures if label_maps]
    for name in ("results.json", "objects.csv", *sorted(pictures), *sorted(maps)):
        _refuse_to_overwrite(folder / name)
    if crops:
        check_unused(folder / "crops")
    make_folder(folder)
    names = {category.id: category.name for category in description.categories}
    found_objects = unread = 0
    with locked(folder), PredictedFiles(folder, names, crops=crops, label_maps=label_maps) as writer:
        predicted = prediction.predict(
            loaded.model.to(chosen),
            description,
            files,
            device=chosen,
            score_threshold=score_threshold,
            tile=tile,
        )
        for name, found in zip(pictures, predicted, strict=True):
            if isinstance(found, InputError):
                if len(files) == 1:
                    raise found
                logger.warning("%s", found)
                unread += 1
                continue
            picture = writer.add(name, found.path, found.image, found.results)
            found_objects += len(found.results)
            print(f"{picture}: {len(found.results)} objects")
    if unread == len(files):
        raise InputError(f"none of the {unread} images can be predicted")
    if not found_objects:
        least = prediction.thresholds_of(description, score_threshold)
        logger.warning(
            "no detection reaches its score threshold (%.2f or more); choose a lower --score-threshold",
            min(least),
        )
    print(folder / "results.json")
    print(folder / "objects.csv")
    if unread:
        raise InputError(f"{unread} of {len(files)} images are left out, because of the faults above")


def export(
    checkpoint: str,
    output: str,
    loss: str | None = None,
    model: str | None = None,
    mask_branch: str | None = None,
) -> None:
    """Export a trained model to ONNX or torch.export, to run it without maskloss.

    Args:
        checkpoint: model file, or folder of a run: its best model, or its newest if it was not evaluated yet.
        output: file to write: FILE.onnx, or FILE.pt2 for torch.export.load.
        loss: import path of the model's loss, required if a user's mask term computes the masks.
        model: import path of the model, required if user code builds it.
        mask_branch: import path of the mask branch, required if user code builds it.
    """
    from maskloss.files import make_folder
    from maskloss.training import export as exporting
    from maskloss.training.model_file import load_model

    path = Path(output)
    _refuse_to_overwrite(path)
    loaded = load_model(checkpoint, loss=loss, model=model, mask_branch=mask_branch)
    make_folder(path.parent)
    logger.info("exporting the model, which takes a few minutes")
    exporting.export(loaded.model, loaded.description, path)
    print(path)


def ablate(
    config: str,
    output: str,
    engine: Literal["local", "ray"] = "local",
    jobs: int = 1,
    ray_address: str | None = None,
) -> None:
    """Train variants of a config over several seeds, and report which differ and by how much.

    An interrupted sweep resumes where it stopped.

    Args:
        config: YAML file with `base`, `variants` and `seeds`, and optionally `baseline`, `tune`, `tune_fraction`,
            `cpus` and `gpus`.
        output: folder of the sweep, for runs/, results.json, table.md and report.html.
        engine: "local" executes the runs on this machine, "ray" hands them to Ray.
        jobs: number of runs at the same time on this machine; they share its CPUs.
        ray_address: address of an existing Ray cluster. If omitted: that of RAY_ADDRESS, or else a new local cluster.
    """
    from maskloss.ablation import sweep

    page = sweep.ablate(config, output, engine=engine, jobs=jobs, ray_address=ray_address)
    print((Path(output) / "table.md").read_text("utf-8"))
    print(f"report: {page}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: arguments of the command line; None takes `sys.argv[1:]`.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        # A file name may contain characters that the terminal's encoding does not have.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        if stream is None:  # closed by whoever started the process
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    try:
        with _signals_handled(), messages_on_screen():
            _run(list(sys.argv[1:] if arguments is None else arguments))
    except InputError as error:
        _fail(error, 2)
    except RunError as error:
        _fail(error, 1)
    except _Terminated as error:
        _fail("terminated", 128 + error.signal)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:
        # The reader, such as `head`, has closed the pipe. Send what Python still flushes to the null device.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        _fail_unexpectedly(error)


def _run(arguments: list[str]) -> None:
    # Imported here, so that a missing package is an error of one line.
    from maskloss.parser import TRAINING, completion, make_parser, underscored

    arguments = [underscored(argument) for argument in arguments]
    if arguments and arguments[0].partition("=")[0] == "--print_completion":
        print(completion(COMMANDS, "=".join(arguments).partition("=")[2]))
        return
    parser = make_parser(COMMANDS, arguments[0] if arguments else "")
    arguments, files = _with_configs_read(arguments, parser)
    parser.files_of_options.update(files)
    try:
        options = parser.parse_args(arguments)
        command: str = options.command
        settings = options[command].as_dict()
    except (RecursionError, UnicodeError, OverflowError, MemoryError) as error:
        raise InputError(f"the options cannot be read: {type(error).__name__}: {error}") from error
    if command in TRAINING:
        settings.pop("config")
    else:
        settings = {
            name: [with_home(item) for item in value] if isinstance(value, list) else with_home(value)
            for name, value in settings.items()
        }
    # Import torch, which takes seconds, while Ctrl-C still ends the process with one line.
    import torch  # noqa: F401

    if threading.current_thread() is threading.main_thread():
        interrupt_by_exception()
    try:
        COMMANDS[command](**settings)
    except InputError as error:
        raise InputError(parser.with_file(str(error))) from error


def _with_configs_read(arguments: list[str], parser: Parser) -> tuple[list[str], dict[str, str]]:
    """Read the --config files of `train` and `find-lr`, more strictly than jsonargparse does.

    Returns:
        The arguments, with the content of each file in the place of its path and underscores in its keys; and the file
        of each option that is given in a file and not in the arguments.

    Raises:
        InputError: a file cannot be read, or has a key that is no option.
    """
    from maskloss.parser import TRAINING
    from maskloss.training.yaml_files import dump_yaml, read_options

    if not arguments or arguments[0] not in TRAINING:
        return arguments, {}

    arguments = list(arguments)
    files: dict[str, str] = {}
    for position, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option == "--config" and (equals or position + 1 < len(arguments)):
            path = value if equals else arguments[position + 1]
            content = read_options(Path(path), parser.option_names)
            in_place = dump_yaml(content)
            arguments[position if equals else position + 1] = f"{option}={in_place}" if equals else in_place
            files |= dict.fromkeys(content, path)
    given = {
        argument[2:].partition("=")[0].partition(".")[0] for argument in arguments if argument[:2] == "--"
    }
    return arguments, {name: path for name, path in files.items() if name not in given}


class _Terminated(KeyboardInterrupt):
    """Exception for SIGTERM and SIGHUP, so that unfinished files are removed or completed on the way out."""

    def __init__(self, signal: int) -> None:
        super().__init__()
        self.signal = signal


#: Signals of `TERMINATING` that this process turns into an exception, because it runs the `maskloss` command.
_handled: list[int] = []


@contextmanager
def _signals_handled() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into an exception inside this context, as Python does for Ctrl-C.

    `nohup` ignores SIGHUP, and it stays ignored. Forked processes, such as data workers, handle none of these signals:
    they end with this process.
    """
    if threading.current_thread() is threading.main_thread():
        _handled.extend(number for number in TERMINATING if signal.getsignal(number) == signal.SIG_DFL)
    for number in _handled:
        signal.signal(number, _terminate)
    try:
        yield
    finally:
        while _handled:
            signal.signal(_handled.pop(), signal.SIG_DFL)


def _terminate(number: int, _: object) -> None:
    raise _Terminated(number)


def _quiet_in_forks() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in _handled:
        signal.signal(number, signal.SIG_DFL)


def _fail_unexpectedly(error: Exception) -> NoReturn:
    """Exit with one line for an unforeseen error; MASKLOSS_DEBUG=1 also prints its traceback."""
    if os.environ.get("MASKLOSS_DEBUG", "") not in ("", "0"):
        traceback.print_exception(error)
    if type(error).__name__ == "OutOfMemoryError":
        _fail(f"out of GPU memory; a lower --batch-size or --min-size needs less: {error}", 1)
    # Messages of torch, and of the loader of its libraries.
    no_memory = ("can't allocate memory", "failed to map segment")
    if isinstance(error, MemoryError) or any(text in str(error) for text in no_memory):
        _fail(f"out of memory; a lower --batch-size, --workers or --min-size needs less: {error}", 1)
    if isinstance(error, ModuleNotFoundError) and (error.name or "maskloss").partition(".")[0] != "maskloss":
        _fail(f"the command line needs {error.name}: pip install 'maskloss[train]'", 2)
    if isinstance(error, OSError) and error.filename is not None:
        _fail(f"{error.filename}: {error.strerror or error}", 2 if error.errno in _BAD_PATH else 1)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        _fail("the output of this command cannot be written: the disk is full", 1)
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if str(Path(__file__).parent) in frame.filename] or frames
    where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "no traceback"
    described = one_line(f"{type(error).__name__}: {error}", 160)
    _fail(f"internal error: {described} ({where}); please report it with what MASKLOSS_DEBUG=1 shows", 1)


COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "shapes": shapes,
    "check": check,
    "repair": repair,
    "subset": subset,
    "train": train,
    "find-lr": find_lr,
    "evaluate": evaluate,
    "predict": predict,
    "export": export,
    "ablate": ablate,
}


def _train_and_report(config: Any) -> None:
    from maskloss.report.curves import threshold_curves
    from maskloss.report.page import write_report
    from maskloss.report.run_pictures import RunPictures
    from maskloss.training.loop import train
    from maskloss.training.metrics import labels, precision_recall_curves, score_thresholds

    result = train(config, pictures=RunPictures())
    if result.main_process:
        results = result.evaluation.results
        curves = precision_recall_curves(result.validation, results, max_detections=config.max_detections)
        page = write_report(
            config.output_folder,
            result.validation,
            results,
            labels(),
            thresholds=score_thresholds(result.evaluation.metrics, results),
            threshold_svg=threshold_curves(curves.names, curves.recall, curves.precision, curves.scores),
        )
        _print_metrics(result.evaluation.metrics)
        print(f"report: {page}")


def _print_contents(data: Any) -> None:
    labels = {
        "with a mask": data.num_masks,
        "with labeled points": data.num_points,
        "with a weight other than 1": data.num_weights,
    }
    # A mask for every object is the rule, and points and weights are rare.
    said = [
        f"{count} {label}"
        for label, count in labels.items()
        if (count < data.num_objects if label == "with a mask" else count > 0)
    ]
    objects = f"{data.num_objects} objects" + (f" ({', '.join(said)})" if said else "")
    print(
        f"{len(data.images)} images, {objects}, {len(data.categories)} categories, {data.num_crowds} crowds"
    )


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _quiet_in_forks() if _handled else None)


def _print_metrics(metrics: dict[str, Any]) -> None:
    from maskloss.training.metrics import labels

    for kind, label in labels().items():
        values = "  ".join(
            f"{key} {'none' if value is None else f'{value:.3f}'}" for key, value in metrics[kind].items()
        )
        print(f"{label:>8}: {values}")
    if len(metrics["classes"]) > 1:
        _print_classes(metrics["classes"])


def _print_classes(classes: list[dict[str, Any]]) -> None:
    """Print a table of the categories, and only the worst of more than thirty."""
    columns = ("AP", "AP50", "precision", "recall", "score_threshold")

    def value(row: dict[str, Any], name: str) -> float | None:
        number: float | None = (row.get("segm") or row.get("bbox") or {}).get(name)
        return number

    shown = [row for row in classes if row["objects"]]
    if len(shown) > _MOST_CLASSES:
        shown = sorted(shown, key=lambda row: value(row, "AP") or 0.0)[:_MOST_CLASSES]
        print(f"the {_MOST_CLASSES} worst of {len(classes)} categories:")
    width = max([len("category"), *(min(len(row["name"]), 30) for row in shown)])
    print(
        f"{'category':<{width}}  objects  " + "  ".join(f"{name:>9}" for name in columns[:-1]) + "  threshold"
    )
    for row in shown:
        numbers = (value(row, name) for name in columns)
        cells = "  ".join(f"{'none' if number is None else f'{number:.3f}':>9}" for number in numbers)
        print(f"{one_line(row['name'], 30):<{width}}  {row['objects']:>7}  {cells}")


def _refuse_to_overwrite(path: Path) -> None:
    if path.exists():
        raise InputError(f"{path}: already exists; name another --output")


def _fail(error: object, code: int) -> NoReturn:
    print(one_line(f"maskloss: error: {error}"), file=sys.stderr)
    sys.exit(code)
