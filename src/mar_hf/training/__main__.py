# SPDX-License-Identifier: Apache-2.0
"""`accelerate launch -m mar_hf.training`."""

from .programs import main


if __name__ == "__main__":
    main()
