"""Video files to frames: exact, upright, uint8 [n, H, W, 3]."""

from kineticlip.video.cache import ProbeCache
from kineticlip.video.container import VideoError
from kineticlip.video.decode import VideoSource, open_video
from kineticlip.video.plan import Plan, plan_frames
from kineticlip.video.probe import Probe

__all__ = [
    "Plan",
    "Probe",
    "ProbeCache",
    "VideoError",
    "VideoSource",
    "open_video",
    "plan_frames",
]
