"""The training loop: its schedule and its steps."""

import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from tqdm import tqdm

import devices
from cluster import Cluster, Stop
from data_generator import ImageTasks, SinusoidTasks
from evaluate import check_same_start, evaluate, known_classes
from files import InputError, say
from maml import MAML, adapt
from recipe import Recipe, to_flags
from report import Report, before_and_after, task_picture, tell
from runs import Run
from utils import Tasks

# In iterations, from the original's main.py.
SUMMARY_INTERVAL = 100
VALIDATION_INTERVAL = 500

CURVE_INTERVAL = 1000  # for curves beyond J updates. Differs: the original's 100 takes 3% of an Omniglot run


class Settings(NamedTuple):
    """How training validates, saves and logs. It affects which checkpoint is the best, but not the weights."""

    val_split: str = "val"  # "test": validate on the test classes, without choosing a best checkpoint
    val_tasks: int = 200
    eval_seed: int = 0  # seed of the validation tasks
    save_interval: int = 1000  # iterations between checkpoints
    log: bool = True  # write TensorBoard events
    data: Mapping[str, object] = {}  # where the images are: recorded for --run, but not part of the run's identity


class Clock(NamedTuple):
    """Iterations at which something is due: `first` and every `interval` after it, below `end`."""

    first: int
    interval: int
    end: int

    def due(self, iteration: int) -> bool:
        """Return whether it is due at this iteration."""
        return self.first <= iteration < self.end and (iteration - self.first) % self.interval == 0

    def next(self, iteration: int) -> float:
        """Return the first due iteration at or after this one; infinity if there is none."""
        intervals = max(0, math.ceil((iteration - self.first) / self.interval))
        due = self.first + intervals * self.interval
        return due if due < self.end else math.inf


class Schedule(NamedTuple):
    """The actions of a training run besides its steps, and their times.

    A summary precedes the step of its iteration; the rest follows it.
    """

    summary: Clock  # evaluate the current training tasks
    validation: Clock  # evaluate the validation tasks, which may make this checkpoint the best
    checkpoint: Clock  # training also saves at the last iteration, at every new best, and when it is stopped

    @classmethod
    def of(cls, total: int, save_interval: int, validates: bool) -> "Schedule":
        """Return the schedule of a run of `total` iterations."""
        return cls(
            summary=Clock(0, SUMMARY_INTERVAL, total),
            validation=Clock(VALIDATION_INTERVAL, VALIDATION_INTERVAL, total if validates else 0),
            checkpoint=Clock(save_interval, save_interval, total),
        )


def train(
    recipe: Recipe,
    run: Run,
    maml: MAML,
    data: SinusoidTasks | ImageTasks,
    settings: Settings,
    stop: Stop | None = None,
    last_picture: Callable[[MAML], np.ndarray | None] | None = None,
    workers: Cluster | None = None,
) -> bool:
    """Pretrain and meta-train from the newest checkpoint on, with the original's printed lines and files.

    Args:
        recipe: everything that the run's numbers depend on.
        run: the run folder. The caller has locked it and checked that it belongs to this recipe.
        maml: the model with its initial weights.
        data: the source of training and validation tasks.
        settings: how to validate, save and log.
        stop: once its `reason` is set, training finishes the current step, saves, and ends.
        last_picture: returns a picture, uint8 [height, width, 3], for the last event of a sinusoid run.
        workers: all processes of the run, if there are several. They share `stop`.

    Return True if all iterations are done, False if training was stopped.
    Raise InputError if the folder has weights but no optimizer state, the run diverges, or a file cannot be written.
    """
    stop, total, images, workers = stop or Stop(), recipe.steps, recipe.dataset.images, workers or Cluster()
    settings = settings._replace(log=settings.log and workers.chief)
    prefix = None
    if run.iterations():
        prefix = run.restore_newest(maml)
        if maml.step == 0:
            raise InputError(
                f"{prefix}: has weights but no optimizer state, so it can only be tested; train in another --logdir"
            )
        say(f"Restoring model weights from {prefix}")
    start = saved = int(maml.step)
    check_same_start(maml, data, workers)
    if start <= total:  # else the run already has more iterations than this recipe
        run.record(to_flags(recipe) | ({"data": settings.data} if settings.data else {}))
    schedule = Schedule.of(total, settings.save_interval, validates=images is not None)
    # A stop may have interrupted the validation of the newest checkpoint.
    missed = schedule.validation.due(start - 1) and run.validation.last != start - 1
    if start >= total and not missed:
        more = "--metatrain_iterations" if recipe.metatrain_steps else "--pretrain_iterations"
        print(f"Nothing left to do: {start} of {total} iterations are done. To train further, give a larger {more}.")
        return True

    run.record_computed(start, devices.computed())
    if isinstance(data, ImageTasks) and workers.chief:
        run.record_classes(data.counts)
        known_classes(data, settings.val_split, run.trained_classes())
    say(f"Run folder {run.folder}, iterations {start} to {total - 1}.")
    value = "accuracy" if images else "mean squared error"
    updates = f"{recipe.inner_steps} update{'s' * (recipe.inner_steps > 1)}"
    print(f"Printed: {value} on support sets before any update, {value} on query sets after {updates}.")
    print("Done initializing, starting training.", flush=True)
    with (
        Report(run.folder, start, recipe, settings.log, workers.chief) as report,
        Steps(maml, data, recipe, stop, report.progress, workers) as steps,
    ):
        report.overview(start, recipe)

        def save() -> None:
            nonlocal prefix, saved
            prefix, saved = run.save(maml), steps.done

        def validate(iteration: int) -> bool:
            """Validate the current weights. Return False if a stop interrupted it."""
            # Differs: the original validates on one meta-batch.
            curve = evaluate(
                maml,
                data,
                settings.val_split,
                settings.val_tasks,
                recipe.inner_steps,
                settings.eval_seed,
                lambda: stop.reason is not None,
                workers=workers,
            )
            if curve is None:
                return False
            report.validation(iteration, curve)
            # The test classes must not choose the best checkpoint.
            accuracy = before_and_after(curve, recipe.inner_steps)[1] if settings.val_split == "val" else -math.inf
            run.validation = run.validation.then(iteration, accuracy, settings.val_tasks)
            if run.validation.best == iteration:
                picture_task(iteration)
            return True

        def picture(iteration: int, tag: str, draw: Callable[[], np.ndarray | None]) -> None:
            """Write a picture for TensorBoard. A failure does not end the training."""
            if settings.log:
                try:
                    if (pixels := draw()) is not None:
                        report.picture(iteration, tag, pixels)
                except Exception as error:
                    reason = next(iter(str(error).splitlines()), type(error).__name__)
                    tell(f"WARNING: {tag}: no picture of iteration {iteration} ({reason}); training continues")

        def picture_task(iteration: int) -> None:
            picture(iteration, "validation/task", lambda: _task_picture(maml, data, settings, recipe.inner_steps))

        if images and start == 0:
            picture_task(0)  # before any step
        if missed and validate(start - 1):
            save()  # with the result of the validation
            missed = False
        while steps.done < total and not stop.reason:
            iteration, curve = steps.done, None
            if schedule.summary.due(iteration):
                curve = _training_curve(maml, recipe, iteration, steps.meta_batch(iteration), workers)
                updates = 0 if iteration < recipe.pretrain_steps else recipe.inner_steps
                if not math.isfinite(loss := np.mean(curve.losses[:, updates])):
                    raise run.diverged(f"the loss at iteration {iteration} is {loss}")
            end = min(
                schedule.summary.next(iteration + 1),
                schedule.validation.next(iteration) + 1,
                schedule.checkpoint.next(iteration) + 1,
                iteration + maml.inner.network.steps_a_call if curve else total,  # print a summary at once
                total,
            )
            gradient_norm = steps.advance(end)
            if steps.done == iteration:
                break  # stopped before a step
            if curve:
                report.training(iteration, curve, gradient_norm, steps.milliseconds())
            latest = steps.done - 1
            if schedule.validation.due(latest):
                missed = not validate(latest)
            best = run.validation.best == latest
            if best or schedule.checkpoint.due(latest) or steps.done == total:
                save()
        if stop.reason and (steps.done < total or missed):
            if steps.done > saved:
                save()
            when = "before the first step, nothing to save"
            if saved > start:
                when = f"after iteration {saved - 1}, saved in {prefix}"
            tell(f"Stopped by {stop.reason} {when}. To continue: python main.py --run={run.folder}")
            return False
        if images and run.validation.best != total - 1:
            picture_task(total - 1)
        if last_picture:
            picture(total - 1, "test/task", lambda: last_picture(maml))
    say(f"Done: {total} iterations, the last saved in {prefix}.")
    if (best := run.validation).best >= 0:
        print(f"Best on validation: model{best.best}, accuracy {best.accuracy:.6g} on {best.tasks} tasks.")
    return True


class Steps:
    """Take the outer steps, while a background thread draws the next tasks.

    A block holds the meta-batches of the iterations that one call computes: one, or 100 for a tiny network.
    """

    def __init__(
        self,
        maml: MAML,
        data: SinusoidTasks | ImageTasks,
        recipe: Recipe,
        stop: Stop,
        progress: tqdm | None = None,
        workers: Cluster | None = None,
    ):
        self.maml, self.data, self.recipe, self.stop, self.progress = maml, data, recipe, stop, progress
        self.workers = workers or Cluster()
        self.done = int(maml.step)  # outer steps
        self.block = maml.inner.network.steps_a_call
        self.drawn = {}  # index of a block -> Future of its tasks
        self.timed, self.seconds = 0, 0.0  # steps since the last call of milliseconds(), and their time
        self.compiled = set()  # of "is pretraining": the first call of each kind compiles, and is not timed

    def __enter__(self) -> "Steps":
        self.background = ThreadPoolExecutor(1)
        return self

    def __exit__(self, *exception):
        self.background.shutdown(cancel_futures=True)

    def meta_batch(self, iteration: int) -> Tasks:
        """Return this process's share of an iteration's meta-batch, as NumPy arrays."""
        number, place = divmod(iteration, self.block)
        return Tasks(*(part[place] for part in self._block(number)))

    def milliseconds(self) -> float | None:
        """Return the mean time per step since the last call, in ms; None if all of them included compilation."""
        mean = 1000 * self.seconds / self.timed if self.timed else None
        self.timed, self.seconds = 0, 0.0
        return mean

    def advance(self, end: int) -> float | None:
        """Take the steps up to and including iteration end - 1, or until a stop.

        Return the norm of the first step's meta-gradient before clipping; None if a stop came first.
        """
        first_norm = None
        while self.done < end and not self.stop.reason:
            began = time.perf_counter()
            number, place = divmod(self.done, self.block)
            pretrain = self.done < self.recipe.pretrain_steps
            bounds = [end, (number + 1) * self.block] + [self.recipe.pretrain_steps] * pretrain
            count = min(bounds) - self.done
            tasks = self._block(number)
            following = (self.done + count) // self.block
            self.drawn = {number: self.drawn[number]}
            self._draw(following)
            if self.block > 1:
                norm = self.maml.many_steps(tasks, tf.constant(place), tf.constant(count), pretrain)
            else:
                step = self.maml.pretrain_step if pretrain else self.maml.train_step
                _, norm = self.workers.together(step, Tasks(*(part[0] for part in tasks)))
            first_norm = norm if first_norm is None else first_norm
            if pretrain in self.compiled:
                self.timed += count
                self.seconds += time.perf_counter() - began
            self.compiled.add(pretrain)
            self.done += count
            if self.progress is not None:
                self.progress.update(count)
        return None if first_norm is None else float(first_norm)

    def _block(self, number):
        """Return the tasks of a block: Tasks with one more leading axis, the iteration."""
        self._draw(number)
        return self.drawn[number].result()

    def _draw(self, number):
        if number not in self.drawn:
            self.drawn[number] = self.background.submit(self._drawn_tasks, number)

    def _drawn_tasks(self, number):
        batch = self.recipe.meta_batch
        share = self.workers.share(batch)  # with several processes, a block is one meta-batch
        first = number * self.block * batch + self.workers.rank * share
        tasks = self.data.draw(self.recipe.seed, "train", first, self.block * share)
        return Tasks(*(part.reshape(self.block, share, *part.shape[1:]) for part in tasks))


def _training_curve(maml, recipe, iteration, tasks, workers):
    """Evaluate an iteration's training tasks before its step. tasks: this process's share of them."""
    further = 0 if iteration % CURVE_INTERVAL else recipe.dataset.curve_steps
    curve = maml.evaluate(tasks, max(recipe.inner_steps, further))
    return tf.nest.map_structure(workers.gathered, curve)


def _task_picture(maml, data, settings, updates):
    """Draw the first validation task with the predictions for its query images after `updates` inner steps."""
    drawn = settings.eval_seed, settings.val_split, 0
    task = Tasks(*(part[0] for part in data.draw(*drawn, 1)))
    adapted = adapt(maml.inner, maml.values(), task, updates)
    return task_picture(data.colours(task), data.names(*drawn), maml.inner.network.apply(adapted, task.query_x).numpy())
