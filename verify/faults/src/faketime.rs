//! Clocks that are wrong: libfaketime, loaded before a program's own libraries.
//!
//! The monotonic clock, by which programs wait, stays as it is: so it does where an administrator, or a
//! time server, sets the clock of a host.

use std::path::{Path, PathBuf};

/// What is added to the environment of a program.
pub type Variables = Vec<(&'static str, String)>;

/// A clock so many seconds ahead, or behind.
pub(crate) fn ahead(seconds: i64) -> Variables {
    let mut variables = variables();
    variables.push(("FAKETIME", format!("{seconds:+}")));
    variables
}

/// A clock that a file tells of, which may change at any time.
pub(crate) fn by_file(path: &Path) -> Variables {
    let mut variables = variables();
    variables.push(("FAKETIME_TIMESTAMP_FILE", path.display().to_string()));
    variables.push(("FAKETIME_NO_CACHE", "1".into()));
    variables
}

fn variables() -> Variables {
    vec![
        ("LD_PRELOAD", library().display().to_string()),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1".into()),
        ("NO_FAKE_STAT", "1".into()),
    ]
}

/// The variant for programs with several threads, wherever the distribution puts it.
fn library() -> PathBuf {
    const NAME: &str = "faketime/libfaketimeMT.so.1";
    let places = std::fs::read_dir("/usr/lib").into_iter().flatten();
    let places = places.filter_map(|place| Some(place.ok()?.path()));
    let mut libraries = places.map(|place| place.join(NAME));
    let found = libraries.find(|library| library.exists());
    found.expect("this test needs libfaketime: apt-get install libfaketime")
}
