//! Signals to a process, and the proof that they arrived.

use std::fs;
use std::process::Command;

use tokio::signal::unix::SignalKind;

use crate::fired::fired;
use crate::wait::until;

/// Sends a signal by its name. The shell's own `kill` is everywhere, and needs no unsafe code.
///
/// # Panics
///
/// When the process is not there.
pub fn send(pid: u32, signal: &str) {
    let status = Command::new("sh")
        .args(["-c", "kill -\"$1\" \"$2\"", "sh", signal, &pid.to_string()])
        .status()
        .expect("there is a shell");
    assert!(status.success(), "cannot send {signal} to {pid}");
}

/// Stops a process, and waits until the kernel says that all of it is stopped.
///
/// # Panics
///
/// When the process is not there, or does not stop.
pub async fn stop(pid: u32) {
    send(pid, "STOP");
    until("the process to be stopped", async || {
        (state(pid) == Some('T')).then_some(())
    })
    .await;
    fired("stop");
}

/// Lets a stopped process go on.
pub fn go_on(pid: u32) {
    send(pid, "CONT");
}

/// The state letter of proc(5).
#[must_use]
pub fn state(pid: u32) -> Option<char> {
    stat(pid)?.first()?.chars().next()
}

/// The processes whose parent is `pid`.
///
/// # Panics
///
/// Without `/proc`.
#[must_use]
pub fn children(pid: u32) -> Vec<u32> {
    let processes = fs::read_dir("/proc").expect("proc is mounted");
    let pids = processes.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let parent = pid.to_string();
    pids.filter(|&pid| stat(pid).is_some_and(|stat| stat.get(1) == Some(&parent)))
        .collect()
}

/// The fields of `/proc/PID/stat` after the name, which may itself have spaces and brackets.
fn stat(pid: u32) -> Option<Vec<String>> {
    let line = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = line.rsplit_once(") ")?;
    Some(fields.split(' ').map(str::to_owned).collect())
}

/// Waits until this process is to end, and says with which exit status.
///
/// # Panics
///
/// When signals cannot be caught.
pub async fn interrupted() -> u8 {
    let catch = |kind| tokio::signal::unix::signal(kind).expect("signals can be caught");
    let (mut interrupt, mut terminate, mut hangup) = (
        catch(SignalKind::interrupt()),
        catch(SignalKind::terminate()),
        catch(SignalKind::hangup()),
    );
    tokio::select! {
        _ = interrupt.recv() => 130,
        _ = terminate.recv() => 143,
        _ = hangup.recv() => 129,
    }
}
