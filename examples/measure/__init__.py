# SPDX-License-Identifier: Apache-2.0
"""An encoder that this project did not train, measures of pictures, and intervals."""
