"""From a recipe to a trained adapter: models, data, training, evaluation.

Nothing is imported here: `transformers` and `datasets` take seconds to load, so each module imports them
where they are used.
"""
