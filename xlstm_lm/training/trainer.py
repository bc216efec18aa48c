"""A run in progress on one rank: its parts, its steps and its checkpoints."""

from __future__ import annotations

import contextlib
import logging
import sys
from typing import Any

import torch

from xlstm_lm.base import console
from xlstm_lm.data import Batch, DocumentData, TrainingData
from xlstm_lm.models.accounting import training_flops_per_token
from xlstm_lm.parallel.process_group import World
from xlstm_lm.runs.checkpoint_writer import CheckpointWriter, Snapshot
from xlstm_lm.runs.folder import RunFolder
from xlstm_lm.runs.session import record_session
from xlstm_lm.training.build import draw_apart, unbuilt_model
from xlstm_lm.training.carried_states import CarriedStates
from xlstm_lm.training.deepspeed_config import choose_precision
from xlstm_lm.training.engine import MicroBatch, TrainingEngine
from xlstm_lm.training.heart import Heart
from xlstm_lm.training.kernel_check import check_kernels
from xlstm_lm.training.layout import Layout
from xlstm_lm.training.profile import StepProfiler
from xlstm_lm.training.report import Report
from xlstm_lm.training.rollback import SpikeGuard, return_to_good_checkpoint
from xlstm_lm.training.run_config import RunConfig
from xlstm_lm.training.safeguards import NOT_FINITE, SkipCounter
from xlstm_lm.training.schedule import learning_rate_ratio
from xlstm_lm.training.sequence_parallel import (
    deepspeed_section,
    own_slice,
    with_divided_rows,
)
from xlstm_lm.training.start import Start
from xlstm_lm.training.stop_request import StopRequest
from xlstm_lm.training.stragglers import StepTimes
from xlstm_lm.training.validation import count_targets, document_ids, evaluate, split_rows

logger = logging.getLogger("xlstm_lm")


class Trainer:
    """A run in progress on this rank."""

    def __init__(
        self,
        run: RunConfig,
        world: World,
        layout: Layout,
        stop_request: StopRequest,
        resources: contextlib.ExitStack,
        data: TrainingData | None = None,
    ) -> None:
        """Set up data, model and reports, from the newest checkpoint if there is one.

        Args:
            run: Configuration of the run.
            world: All processes of the run.
            layout: Division of the run among them.
            stop_request: Signals received so far.
            resources: Stack that closes what is opened here.
            data: Data to train on; None for the documents that `run.data` names.
        """
        self.run, self.world, self.layout, self.stop_request = run, world, layout, stop_request
        self.start = Start(run, world, resources)
        self.run_dir = self.start.run_dir
        console.stage("opening the data")
        self.data = DocumentData(run.data) if data is None else data
        self.tokenizer = self.data.tokenizer
        if self.tokenizer.vocab_size > run.model.vocab_size:
            raise ValueError(
                f"The tokenizer has {self.tokenizer.vocab_size} tokens but model.vocab_size is {run.model.vocab_size}: "
                f"set model.vocab_size to {self.tokenizer.vocab_size} or more (a multiple of 64 is fastest)."
            )
        self.bytes_per_token = torch.as_tensor(self.tokenizer.bytes_per_token)
        self.start.open_folder()
        attempt = self.start.attempt.number
        self.heart = resources.enter_context(Heart(self.run_dir, attempt, world, run.safeguards.phase_seconds))
        stop_request.handle_all()
        console.keep_library_output(RunFolder(self.run_dir).library_log_path)

        rows = layout.rows * layout.micro_batches
        self.start.share_data(self.data)
        self.lanes = range(world.data.rank * rows, (world.data.rank + 1) * rows)
        self.stream = self.data.stream(self.lanes, run.training.seed)
        resources.callback(self.stream.close)
        self.start.restore_data(self.stream, self.tokenizer)
        self.stream.start()  # reads ahead while the model is built
        self.data_fingerprint = world.on_first(self.stream.fingerprint)

        precision = choose_precision(run.training.precision, world.device)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        console.stage("checking the kernels")
        kernels = check_kernels(run.model, world, dtype, self.layout.rows)
        console.stage("building the model")
        torch.manual_seed(run.training.seed)
        model = unbuilt_model(run.model)
        model.activation_checkpointing = run.training.activation_checkpointing
        self.engine = TrainingEngine(
            with_divided_rows(model, world),
            run.optimizer,
            deepspeed_section(run),
            world=world,
            precision=precision,
            micro_batch_size=self.layout.rows,
            accumulation_steps=layout.micro_batches,
            z_loss=run.training.z_loss,
        )
        resources.callback(self.engine.close)
        draw_apart(run.training.seed, world.rank)

        self.times = StepTimes(world)
        resources.callback(self.times.close)
        lease = self.start.lease
        self.writer = CheckpointWriter(world, lease.place if lease else lambda: self.run_dir, self.note_saved)
        resources.callback(self.writer.close)
        self.start.restore_engine(self.engine)
        self.carried = CarriedStates(run.training.carry_state, self.lanes, layout.rows, world)
        if self.start.checkpoint:
            self.carried.load(self.start.checkpoint)
        self.writer.prepare(self.engine.state.shares())
        self.engine.before_update = self.writer.finish_copy
        state = self.start.state
        self.continue_counters(state)
        self.report = Report(
            self.run_dir,
            config=self.start.config,
            wandb=run.wandb,
            world=world,
            precision=precision,
            steps=run.training.steps,
            flops_per_token=training_flops_per_token(run.model, run.data.context_length),
            state=state,
            split=self.start.metrics,
        )
        resources.callback(self.report.close)
        self.profiler = StepProfiler(run.profile, RunFolder(self.run_dir).profile_path, world, self.report.progress.say)
        resources.callback(lambda: self.profiler.close(self.step))
        if world.is_first:
            record_session(self.run_dir, world, self.step, kernels)
        if self.start.message:
            self.report.progress.say(self.start.message)

    def continue_counters(self, state: dict[str, Any]) -> None:
        """Continue the counters of a checkpoint's state."""
        self.step = state["step"]
        self.skips = SkipCounter(self.run.safeguards, state["skipped_steps"], state["skipped_in_a_row"])
        self.guard = SpikeGuard(self.run.safeguards, self.lanes, self.world.device, state.get("spikes", {}))

    def run_steps(self) -> bool:
        """Train and save. Returns True if a stop was requested before the last step, False after the last step."""
        training, optimizer = self.run.training, self.run.optimizer
        if self.step >= training.steps:
            self.report.progress.say(f"The run has its {training.steps} steps; raise training.steps to go on.")
        self.report.clock.restart_window()
        while self.step < training.steps:
            self.heart.step(self.step)
            self.stop_request.step_begins()
            self.profiler.before(self.step + 1)
            with self.times.waiting_for_data():
                batch = own_slice(self.stream.next_batch(), self.world)
            counts = self.count(batch)
            learning_rate = optimizer.learning_rate * learning_rate_ratio(self.run.schedule, self.step, training.steps)
            micro_batches = split_rows(batch, self.layout.rows, self.world.device)
            # This scale makes the gradient that of the mean loss over the target tokens of all ranks.
            scale = self.world.size / counts[0].clamp(min=1)
            every = training.gate_statistics_every
            statistics_due = bool(every) and (self.step + 1) % every == 0
            with self.times.step():
                result = self.engine.train_step(
                    micro_batches,
                    scale,
                    learning_rate,
                    by_layer=statistics_due,
                    judge=self.guard.judge,
                    states=self.carried.before(),
                )
            self.carried.follow(result.states, result.applied)
            self.step += 1
            self.stop_request.note_only()
            self.report.count(counts[0])
            self.guard.observe(self.step, result, batch)
            if self.guard.must_go_back:
                self.go_back()
                continue
            skipped = self.skips.observe(
                result.applied,
                self.step,
                lambda batch=batch: document_ids(batch, self.world),
                self.engine.weights_are_finite,
                self.guard.outlier(result),
            )
            if skipped:
                self.report.event(self.step, "skipped", skipped, documents=document_ids(batch, self.world))

            last = self.step == training.steps
            if self.step % training.log_every == 0 or last or statistics_due or not result.applied:
                measured = self.measure(micro_batches[0], statistics_due) | result.layer_gradient_norms
                self.report.train_step(self.step, result, counts, learning_rate, measured, self.times.gather)
            self.profiler.after(self.step)
            # The engine has waited for the device in this step already: reading the flags costs nothing.
            stop = bool(counts[2]) and not last
            self.writer.advance(int(counts[3]))
            with self.report.clock.paused():
                if last or (training.validate_every and self.step % training.validate_every == 0):
                    with self.heart.phase("validation"):
                        self.validate()
                if last or stop or self.step % training.checkpoint_every == 0 or training.keeps(self.step):
                    with self.heart.phase("save"):
                        self.save()
            if stop:
                break
        with self.heart.phase("save"):
            self.writer.wait()
        return self.step < training.steps

    def go_back(self) -> None:
        """Return to a good checkpoint from before the outliers in a row, and pass over their documents. Collective.

        The checkpoint is saved again with what it lacks: the documents to pass over, and the count of returns.

        Raises:
            RunError: the run has gone back too often, or there is no such checkpoint.
        """
        guard = self.guard
        documents = guard.document_ids(self.world)
        guard.check_limit(documents)
        with self.heart.phase("start"):
            self.writer.wait()
            run_dir = self.world.on_first(lambda: self.start.lease.place())
            checkpoint = return_to_good_checkpoint(run_dir, guard.first_in_a_row, self.engine, self.world)
            state = checkpoint.state
            self.continue_counters(state)
            self.guard.returns = [*guard.returns, guard.step]
            self.stream.load_state_dict(state["data"])
            self.carried.load(checkpoint)
            self.stream.pass_over(guard.places)
            self.report.go_back(state)
        with self.heart.phase("save"), self.report.clock.paused():
            self.save()
            self.writer.wait()
        self.report.event(**guard.return_event(self.step, documents, self.world))

    def measure(self, micro_batch: MicroBatch, statistics_due: bool) -> dict[str, torch.Tensor]:
        """Scalar metrics of a logged step, by name, that need a computation of their own. Collective."""
        statistics = self.engine.statistics(micro_batch) if statistics_due else {}
        return {"parameter_norm": self.engine.parameter_norm(), **statistics}

    def count(self, batch: Batch) -> torch.Tensor:
        """Count target tokens, their bytes, ranks that must stop, and ranks whose checkpoint is written.

        Counts are over all ranks: int64 (4,), on the device.

        Rank 0 must stop as well when the run's folder has been moved or removed, which `save` then reports.
        """
        lease = self.start.lease
        folder_is_gone = lease is not None and not lease.is_in_place
        asked_to_stop = bool(self.stop_request.reason) or folder_is_gone
        flags = torch.tensor([int(asked_to_stop), int(self.writer.is_ready)])
        counts = torch.cat((count_targets(batch, self.bytes_per_token), flags))
        return self.world.sum_(counts.to(self.world.device, non_blocking=True))

    def validate(self) -> None:
        """Measure and report the loss of the held-out documents, if there are any. Collective."""
        data = self.world.data
        batches = self.data.validation_batches(rows=self.layout.rows, rank=data.rank, world_size=data.size)
        if batches is None:
            return
        slices = (own_slice(batch, self.world) for batch in batches)
        totals = evaluate(self.engine, slices, world=self.world, bytes_per_token=self.bytes_per_token)
        self.report.validation(self.step, *totals)

    def record_end(self, stopped: bool) -> None:
        """Set the state in which status.json leaves the run. Collective.

        Args:
            stopped: Whether a stop was requested before the last step.
        """
        if not stopped:
            self.start.attempt.end("finished", f"All {self.run.training.steps:,} steps are made.")
            return
        requests = self.world.gather((self.stop_request.reason, self.stop_request.is_by_hand))
        reason, by_hand = next(((reason, by_hand) for reason, by_hand in requests if reason), ("", False))
        self.start.attempt.end("stopped" if by_hand else "preempted", reason)

    def note_saved(self, step: int, seconds: float) -> None:
        """Record that the checkpoint of a step is published, as many seconds after its save began."""
        self.stop_request.saved(seconds)
        if self.world.is_first:
            self.start.attempt.saved(step)

    def save(self) -> None:
        """Begin to write a checkpoint of this step; older ones are kept if its weights are not finite. Collective.

        The next update waits until the weights are copied, `self.writer.wait` until the checkpoint is published.

        Raises:
            RunError: the disk is full, or the run's folder was removed or moved. If moved, the step is saved there.
        """
        run_dir = self.world.on_first(lambda: self.start.lease.place())
        # A checkpoint amid outliers may be followed by a return to one from before them.
        keep = sys.maxsize if self.guard.in_a_row else self.run.training.keep_checkpoints
        if not self.engine.weights_are_finite():
            keep = sys.maxsize
            if self.world.is_first:
                logger.warning("Step %d: %s Older checkpoints are kept.", self.step, NOT_FINITE)
        lanes = self.world.gather(self.stream.state_dict())
        state = {
            "step": self.step,
            "tokens": self.report.tokens,
            "optimizer_steps": self.engine.optimizer_steps,
            "skipped_steps": self.skips.total,
            "skipped_in_a_row": self.skips.in_a_row,
            "elapsed_seconds": self.report.clock.elapsed,
            "data": {lane: value for of_rank in lanes for lane, value in of_rank.items()},
            "data_fingerprint": self.data_fingerprint,
            "processes": self.world.size,
            "zero_stage": self.engine.stage,
            "optimizer": self.run.optimizer.kind,
            "spikes": self.guard.state(self.world),
        }
        self.report.sync()
        self.writer.save(
            Snapshot(
                state=state,
                shapes=self.engine.state.stored_shapes | self.carried.stored_shapes(),
                shares=self.engine.state.shares() | self.carried.shares(),
                config_yaml=self.start.config_yaml,
                save_tokenizer=self.tokenizer.save,
                keep=keep,
                keep_at=self.run.training.keeps,
            )
        )
        if run_dir != self.run_dir:
            self.writer.wait()
            raise self.start.moved(run_dir, self.step)
