"""Offramp: the stages that carry a sparse teacher and a small dense student from text to evidence."""
