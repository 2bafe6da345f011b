"""C++ headers of ap_fixed, with which exported fixed-point networks compile without a vendor's tools.

The headers are the open ones (Apache 2.0) that the package hls4ml ships; its wheel is fetched from the package registry
once, compared with a checksum, and nothing of it is installed or run.
"""

import os
import pathlib

from jaxaccel.models.weights.downloads import Progress, folder_from_wheel
from jaxaccel.models.weights.sources import cache_folder

REQUIREMENT = "hls4ml==1.3.0"
FOLDER = "hls4ml/templates/vivado/ap_types"
SHA256 = "01bf1de2cd9bca56699b9fe3385cb1735026b022f9580fe1d73faf192dfb90f2"
SIZE = 3_300_830


def fetch_ap_types(
    cache_dir: str | os.PathLike[str] | None = None, *, progress: Progress | None = None
) -> pathlib.Path:
    """The folder of headers, for ``g++ -I``; fetched if it is not in the cache.

    Args:
        cache_dir: where downloads are kept, see `cache_folder`.
        progress: called with name, bytes done, bytes in total.

    Raises:
        WeightsError: if the wheel cannot be fetched, or is not the expected one.
    """
    destination = cache_folder(cache_dir) / "wheels" / REQUIREMENT.replace("==", "-") / "ap_types"
    return folder_from_wheel(REQUIREMENT, FOLDER, destination, sha256=SHA256, size=SIZE, progress=progress)
