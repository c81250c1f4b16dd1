"""Set the package's long description; everything else about the build is in pyproject.toml.

The description is README.md without its images and with the paths of relative links spelled out,
because both lead nowhere outside the repository.
"""

import re
from pathlib import Path

from setuptools import setup

text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
text = re.sub(r"!\[[^\]]*\]\((?!https?:)[^)]+\)\n*", "", text)
text = re.sub(r"\[([^\]]+)\]\((?!https?:|#)([^)]+)\)", r"\1 (`\2`)", text)
setup(long_description=text, long_description_content_type="text/markdown")
