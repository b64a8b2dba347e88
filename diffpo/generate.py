"""``python -m diffpo.generate``, the command in generate_command.py.

``diffpo.generate`` is the function all the same, whatever is imported: see ``_Package`` in the package's __init__.py.
"""

if __name__ == "__main__":
    from diffpo.generate_command import main
    from diffpo.runs.faults import output_may_fail

    with output_may_fail():
        raise SystemExit(main())
