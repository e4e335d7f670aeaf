"""Python runs this when it starts. vLLM's imports, of which a deployment has a dozen, make millions
of objects that stay: a search for garbage after every 700 of them takes a tenth of the time."""

import gc

gc.set_threshold(50_000, 20, 100)
