"""Training around the engine, in reading order: optim, data, chat, rows, trainer, finetune.

optim      SGD, AdamW, clipping, schedules
data       files of any size, checked and cut into pages
chat       a model's own chat template
rows       pages to token rows in a seeded order, rows to batches
trainer    one step after another; evaluation
finetune   the main job, with its run directory, saved state, loss curve and Ctrl-C
compare    every method on one model and the same batches
"""
