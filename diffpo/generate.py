"""``python -m diffpo.generate``, the command in generate_command.py.

The package has a public function of the same name. Importing a submodule binds what stands in ``sys.modules`` under its name to the
package's attribute, so an imported ``diffpo.generate`` puts the function there: the attribute is the function, always.
"""

import sys

if __name__ == "__main__":
    from diffpo.generate_command import main

    sys.exit(main())

from diffpo.decoding.generation import generate

sys.modules[__name__] = generate
