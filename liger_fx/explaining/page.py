from liger_fx.explaining.explanation import Explanation
def as_page(explanation: Explanation) -> str:
    return ""
