//! `docs/faults.md`, made of the table and of the results of the last full run.

use std::fmt::Write as _;

use super::{GATE, GROUPS, INVARIANTS, ROWS, Row};

const HEAD: &str = "\
# Faults

<!-- Made by `./scripts/faults --docs` from verify/faults/src/matrix and verify/faults/results.txt. -->

One row is one fault, injected for real: processes are killed, stopped and starved, a PostgreSQL
server is crashed, frozen, filled up and failed over, and a proxy that understands its protocol drops,
delays and cuts chosen messages. A row is **green** when each of its tests passed and the place that
injects the fault counted it. Groups A to E gate a release: no row of theirs may be without tests.

    ./scripts/faults            # small sizes, minutes
    ./scripts/faults --full     # full sizes, resumes where it was interrupted
    ./scripts/faults A D04      # a group, a row

Size is how often a row injects its fault in a small and in a full run. The result is that of the last
full run of all rows in which none was red; other runs are in [reliability.md](reliability.md#runs-on-record).
Rows of F to I mostly run in the process of the test, and in F and H the odd request is the fault.
";

/// The text of the page. `results` has a line `A04 green fired=12` for each row that was run.
#[must_use]
pub fn page(results: &str) -> String {
    let mut page = String::from(HEAD);
    page += "\n## What must hold\n\n| id | invariant |\n|---|---|\n";
    for (index, invariant) in INVARIANTS.iter().enumerate() {
        let _ = writeln!(page, "| I-{} | {invariant} |", index + 1);
    }
    for &(group, name) in GROUPS {
        let gate = if GATE.contains(&group) {
            ""
        } else {
            " (no gate)"
        };
        let _ = write!(
            page,
            "\n## {group}. {name}{gate}\n\n| id | fault | injection | must hold | size | result |\n|---|---|---|---|---|---|\n"
        );
        for row in ROWS.iter().filter(|row| row.group() == group) {
            let Row {
                id,
                fault,
                injection,
                holds,
                size: (small, full, unit),
                ..
            } = row;
            let result = result(row, results);
            let _ = writeln!(
                page,
                "| {id} | {fault} | {injection} | {holds} | {small} / {full} {unit} | {result} |"
            );
        }
    }
    page
}

fn result(row: &Row, results: &str) -> String {
    if let Some(why) = row.not_yet {
        return format!("not yet: {why}");
    }
    let mut lines = results.lines();
    let line = lines.find_map(|line| line.strip_prefix(row.id));
    line.unwrap_or("not run").trim().to_owned()
}
