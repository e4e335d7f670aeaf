"""The parts of scripts/capture_golden.py: one for each .frames file, one for fields.json."""
