"""The training loop: its clocks and its steps."""

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

# The original's (its main.py), in iterations.
SUMMARY_INTERVAL = 100
VALIDATION_INTERVAL = 500

CURVE_INTERVAL = 1000  # of summaries beyond J updates. Differs: every 100 in the original, 3 % of an Omniglot run


class Settings(NamedTuple):
    """What training does besides its steps. No weight depends on it, but which checkpoint is the best does."""

    val_split: str = "val"  # "test": the test classes, which choose no best checkpoint
    val_tasks: int = 200
    eval_seed: int = 0  # of the validation tasks
    save_interval: int = 1000  # iterations
    log: bool = True  # write TensorBoard events
    data: Mapping[str, object] = {}  # where the images are, for --run: flags.json has it, but it is not compared


class Clock(NamedTuple):
    """The iterations at which something is due: `first`, and every `interval` after it, below `end`."""

    first: int
    interval: int
    end: int

    def due(self, iteration: int) -> bool:
        """Tells whether it is due at this iteration."""
        return self.first <= iteration < self.end and (iteration - self.first) % self.interval == 0

    def next(self, iteration: int) -> float:
        """Finds the first iteration at which it is due, from this one on; infinity if there is none."""
        intervals = max(0, math.ceil((iteration - self.first) / self.interval))
        due = self.first + intervals * self.interval
        return due if due < self.end else math.inf


class Schedule(NamedTuple):
    """When a training run does more than a step. A summary is made before the step of its iteration, the rest after."""

    summary: Clock  # the training tasks at hand are evaluated
    validation: Clock  # the validation tasks are evaluated, and may choose a new best checkpoint
    checkpoint: Clock  # besides, one is saved after the last iteration, at every new best, and when training is stopped

    @classmethod
    def of(cls, total: int, save_interval: int, validates: bool) -> "Schedule":
        """Makes the schedule of `total` iterations."""
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
    """Pretrains and meta-trains from where the run folder stands, with the original's printed lines and files.

    Args:
        recipe: of the run.
        run: its folder, locked by the caller, who has checked that it is a run of this recipe.
        maml: the model with its initial weights.
        data: where the training tasks and the validation tasks are drawn from.
        settings: what is done besides the steps.
        stop: training ends after the step at hand, and saves, once its `reason` is set.
        last_picture: makes the picture, uint8 [height, width, 3], that ends the events of a sinusoid run.
        workers: the processes that compute the run together, if there are several. `stop` is then one of all.
    Returns True when all iterations are done, False when it was stopped.
    Raises InputError where the folder holds weights alone, the run diverges, or a file cannot be written.
    """
    stop, total, images, workers = stop or Stop(), recipe.steps, recipe.dataset.images, workers or Cluster()
    settings = settings._replace(log=settings.log and workers.chief)
    prefix = None
    if run.iterations():
        prefix = run.restore_newest(maml)
        if maml.step == 0:
            raise InputError(
                f"{prefix} holds weights alone, to be tested and not trained further: give another --logdir"
            )
        say(f"Restoring model weights from {prefix}")
    start = saved = int(maml.step)
    check_same_start(maml, data, workers)
    if start <= total:  # else the folder has more than this recipe says
        run.record(to_flags(recipe) | ({"data": settings.data} if settings.data else {}))
    schedule = Schedule.of(total, settings.save_interval, validates=images is not None)
    # A stop may have cut the validation of the newest checkpoint short.
    missed = schedule.validation.due(start - 1) and run.validation.last != start - 1
    if start >= total and not missed:
        more = "--metatrain_iterations" if recipe.metatrain_steps else "--pretrain_iterations"
        print(f"Nothing left to do: {start} of {total} iterations are done. To go on, give more {more}.")
        return True

    run.record_computed(start, devices.computed())
    if isinstance(data, ImageTasks) and workers.chief:
        run.record_classes(data.classes["train"].names)
        known_classes(data, settings.val_split, run.trained_classes())
    say(f"Run folder {run.folder}, iterations {start} to {total - 1}.")
    value = "accuracy" if images else "mean squared error"
    print(f"Printed: {value} on support sets before any update, {value} on query sets after {recipe.inner_steps}.")
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
            """Validates the weights at hand; returns whether it came to its end."""
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
            # The test classes choose no best.
            accuracy = before_and_after(curve, recipe.inner_steps)[1] if settings.val_split == "val" else -math.inf
            run.validation = run.validation.then(iteration, accuracy, settings.val_tasks)
            if run.validation.best == iteration:
                picture(iteration)
            return True

        def picture(iteration: int) -> None:
            if settings.log:
                report.picture(iteration, "validation_task", _task_picture(maml, data, settings, recipe.inner_steps))

        if images and start == 0:
            picture(0)  # before any step
        if missed and validate(start - 1):
            save()  # with what validation has found
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
                iteration + maml.inner.network.steps_a_call if curve else total,  # a summary is told at once
                total,
            )
            gradient_norm = steps.advance(end)
            if steps.done == iteration:
                break  # it was stopped before a step
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
            picture(total - 1)
        if settings.log and last_picture and (pixels := last_picture(maml)) is not None:
            report.picture(total - 1, "test_task", pixels)
    say(f"Done: {total} iterations, the last saved in {prefix}.")
    if (best := run.validation).best >= 0:
        print(f"Best on validation: model{best.best}, accuracy {best.accuracy:.6g} on {best.tasks} tasks.")
    return True


class Steps:
    """Takes the outer steps, on tasks that are drawn while the steps before run.

    Tasks are drawn a block at a time. A block is the meta-batches of as many iterations as the network takes in one
    call: one, or a hundred of a tiny network.
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
        self.drawn = {}  # number of a block -> a Future of its tasks
        self.timed, self.seconds = 0, 0.0  # steps, and what they took, since the last call of milliseconds()

    def __enter__(self) -> "Steps":
        self.background = ThreadPoolExecutor(1)
        return self

    def __exit__(self, *exception):
        self.background.shutdown(cancel_futures=True)

    def meta_batch(self, iteration: int) -> Tasks:
        """Gives this process's share of the meta-batch of an iteration, as NumPy arrays."""
        number, place = divmod(iteration, self.block)
        return Tasks(*(part[place] for part in self._block(number)))

    def milliseconds(self) -> float:
        """Gives the mean time of a step, in ms, since the last call."""
        mean = 1000 * self.seconds / self.timed
        self.timed, self.seconds = 0, 0.0
        return mean

    def advance(self, end: int) -> float | None:
        """Takes the steps up to iteration end - 1, unless it is stopped.

        Returns the norm of the first one's meta-gradient before the clip; None where no step was taken.
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
            self.timed += count
            self.seconds += time.perf_counter() - began
            self.done += count
            if self.progress is not None:
                self.progress.update(count)
        return None if first_norm is None else float(first_norm)

    def _block(self, number):
        """The tasks of a block: Tasks with one more leading axis."""
        self._draw(number)
        return self.drawn[number].result()

    def _draw(self, number):
        if number not in self.drawn:
            self.drawn[number] = self.background.submit(self._drawn_tasks, number)

    def _drawn_tasks(self, number):
        batch = self.recipe.meta_batch
        share = self.workers.share(batch)  # of several processes, whose blocks have one meta-batch
        first = number * self.block * batch + self.workers.rank * share
        tasks = self.data.draw(self.recipe.seed, "train", first, self.block * share)
        return Tasks(*(part.reshape(self.block, share, *part.shape[1:]) for part in tasks))


def _training_curve(maml, recipe, iteration, tasks, workers):
    """Evaluate the training tasks of an iteration before its step. tasks: this process's share of them."""
    further = 0 if iteration % CURVE_INTERVAL else recipe.dataset.curve_steps
    curve = maml.evaluate(tasks, max(recipe.inner_steps, further))
    return tf.nest.map_structure(workers.gathered, curve)


def _task_picture(maml, data, settings, updates):
    """The first validation task, and what its query images are taken for after so many updates."""
    drawn = settings.eval_seed, settings.val_split, 0
    task = Tasks(*(part[0] for part in data.draw(*drawn, 1)))
    adapted = adapt(maml.inner, maml.values(), task, updates)
    return task_picture(data.colours(task), data.names(*drawn), maml.inner.network.apply(adapted, task.query_x).numpy())
