"""What the command line says."""


def refused(told, *arguments) -> str:
    """The one message of a mistake."""
    code, _, err = told(*arguments)
    assert code == 2 and err.count("error:") == 1 and "Traceback" not in err, err
    return err
