//! Running other programs: an error names the command and has what it said.

use std::{
    io,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::Error;

/// Runs `command` to its end and returns its standard output. Its standard error is part of the error.
pub(crate) fn output(command: &mut Command) -> Result<String, Error> {
    let output = command.stdin(Stdio::null()).output().map_err(|error| cannot_start(command, &error))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(failed(command, format!("{}\n{}", output.status, said.trim_end())));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Shows `command` and runs it, with all that it says, on standard error: a build script's standard output is cargo's.
/// Past `limit` it is ended, since what installs something may wait on a silent network.
pub(crate) fn run(command: &mut Command, limit: Duration) -> Result<(), Error> {
    eprintln!("$ {command:?}");
    command.stdin(Stdio::null()).stdout(io::stderr());
    let mut child = command.spawn().map_err(|error| cannot_start(command, &error))?;
    let deadline = Instant::now() + limit;
    loop {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => return Ok(()),
            Ok(Some(status)) => return Err(failed(command, status.to_string())),
            Ok(None) if Instant::now() < deadline => thread::sleep(Duration::from_millis(20)),
            waiting => {
                // A process that has ended meanwhile cannot be ended, which is as well.
                let _ = child.kill().and_then(|()| child.wait());
                let why = waiting.err().map(|error| error.to_string());
                let late = || format!("no end after {} s", limit.as_secs());
                return Err(failed(command, why.unwrap_or_else(late)));
            }
        }
    }
}

fn cannot_start(command: &Command, error: &io::Error) -> Error {
    failed(command, format!("cannot be started: {error}"))
}

fn failed(command: &Command, outcome: String) -> Error {
    Error::Command { command: format!("{command:?}"), outcome }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn standard_output_is_returned_and_standard_error_is_part_of_the_error() {
        let shell = |script| output(Command::new("sh").args(["-c", script]));
        assert_eq!(shell("echo this; echo that >&2").unwrap(), "this\n");
        let error = shell("echo this; echo that >&2; exit 3").unwrap_err().to_string();
        assert!(error.ends_with("`: exit status: 3\nthat") && error.contains("exit 3\""), "{error}");
        let error = output(&mut Command::new("no-such-program")).unwrap_err().to_string();
        assert!(error.starts_with("`\"no-such-program\"`: cannot be started"), "{error}");
    }

    #[test]
    fn a_program_past_its_limit_is_ended() {
        let begun = Instant::now();
        let error = run(Command::new("sleep").arg("600"), Duration::from_millis(1)).unwrap_err();
        assert_eq!(error.to_string(), "`\"sleep\" \"600\"`: no end after 0 s");
        assert!(begun.elapsed() < Duration::from_secs(60));
        assert!(run(&mut Command::new("true"), Duration::from_secs(60)).is_ok());
        let error = run(&mut Command::new("false"), Duration::from_secs(60)).unwrap_err();
        assert_eq!(error.to_string(), "`\"false\"`: exit status: 1");
    }
}
