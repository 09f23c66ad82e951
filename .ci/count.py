"""Print `ci: N passed, N failed, N skipped` for pytest's XML report and a number of notebooks that passed."""
import sys
import xml.etree.ElementTree as ET

report, notebooks = sys.argv[1], int(sys.argv[2])
suites = list(ET.parse(report).getroot().iter("testsuite"))
total, failed, errors, skipped = (sum(int(s.get(k, 0)) for s in suites) for k in ("tests", "failures", "errors", "skipped"))
if not total or not notebooks: sys.exit("no test was run")
print(f"ci: {notebooks + total - failed - errors - skipped} passed, {failed + errors} failed, {skipped} skipped")
