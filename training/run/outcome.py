"""What a run has come to at its end."""

from training.run.log import RunLog
from training.run.record import RunRecord


def report_outcome(record: RunRecord, log: RunLog, can_resume: bool) -> bool:
    """
    Tell what a run lacks at its end, and how it gets there; on the main process. Returns whether the model has learnt
    what required_eval_loss asks for.
    """
    progress = record.progress
    shortfall = record.shortfall()
    if shortfall:
        log.report(shortfall)
        log.write(progress["step"], {"ended": shortfall, "planned_steps": progress["planned_steps"]})
    if record.missed_loss:
        option = "--max_minutes" if record.shortened else "--max_steps"
        resume = ", and --resume_from_checkpoint latest to go on from here" if can_resume else ""
        log.report(f"its samples show meshes that it has not learnt: give the run a larger {option}{resume}")
    return not record.missed_loss
