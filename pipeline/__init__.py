"""How one stage trains. Its processes run the code that their launcher names, or nothing."""

import os
import sys


def _refuse_other_code() -> None:
    """End this process if it has found this package elsewhere than its launcher says, which happens where that folder
    is gone: Python then goes on to the next place that has the package, such as a checkout that was edited since."""
    wanted, found = os.environ.get("FCMAE_CODE"), os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if wanted and os.path.realpath(wanted) != os.path.realpath(found):
        print(f"the code of this run in {wanted} is gone, and that in {found} is not run in its place", file=sys.stderr)
        sys.exit(78)  # no node would do better; see pipeline.stage.outcome


_refuse_other_code()
