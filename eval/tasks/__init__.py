"""Made-up tasks that ask for one ability each, and the studies over them: `python -m eval.tasks`."""
