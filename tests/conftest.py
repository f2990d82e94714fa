"""What every test shares: an environment that reaches no hub, no running Ray cluster and no telemetry."""

import os

from hypothesis import settings

# Set here, at import: Ray and Hugging Face read these when first imported; Ray's workers inherit them.
os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # keeps Ray's ports on loopback
        "RAY_USAGE_STATS_ENABLED": "0",
        "TOKENIZERS_PARALLELISM": "false",  # tokenizers warn when a process that used threads forks
    }
)
# A test that wants a running cluster starts one and says so itself.
os.environ.pop("RAY_ADDRESS", None)

# Examples follow from the test's source alone and take the time they need: one run is like the next.
settings.register_profile("raybge", derandomize=True, deadline=None)
settings.load_profile("raybge")
