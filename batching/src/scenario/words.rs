//! A command line: words, and options in the form `name=value`.

use std::str::FromStr;

pub(super) struct Words<'a> {
    command: &'a str,
    rest: std::vec::IntoIter<&'a str>,
    options: Vec<(&'a str, &'a str)>,
}

impl<'a> Words<'a> {
    pub(super) fn new(line: &'a str) -> Result<Words<'a>, String> {
        let mut words = line.split_whitespace();
        let command = words.next().ok_or("no command")?;
        let (options, rest): (Vec<_>, Vec<_>) = words.partition(|word| word.contains('='));
        let options = options.into_iter().filter_map(|option| option.split_once('=')).collect();
        Ok(Words { command, rest: rest.into_iter(), options })
    }

    pub(super) fn command(&self) -> &'a str {
        self.command
    }

    /// The next plain word.
    pub(super) fn next(&mut self, what: &str) -> Result<&'a str, String> {
        self.rest.next().ok_or_else(|| format!("{} needs {what}", self.command))
    }

    /// All further plain words.
    pub(super) fn rest(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        self.rest.clone()
    }

    pub(super) fn options(&self) -> &[(&'a str, &'a str)] {
        &self.options
    }

    /// Refuses options that a command does not know: a misspelt one must not pass in silence.
    pub(super) fn only(&self, known: &[&str]) -> Result<(), String> {
        match self.options.iter().find(|(option, _)| !known.contains(option)) {
            Some((option, _)) => Err(format!("{} has no option {option}", self.command)),
            None => Ok(()),
        }
    }

    pub(super) fn option(&self, name: &str) -> Option<&'a str> {
        self.options.iter().find(|(option, _)| *option == name).map(|&(_, value)| value)
    }

    pub(super) fn parsed<T: FromStr>(&self, name: &str) -> Result<Option<T>, String> {
        let parse = |value: &str| value.parse().map_err(|_| format!("{name}={value} is not a number"));
        self.option(name).map(parse).transpose()
    }

    /// The number of an option, or `usual`.
    pub(super) fn number<T: FromStr>(&self, name: &str, usual: T) -> Result<T, String> {
        Ok(self.parsed(name)?.unwrap_or(usual))
    }

    /// The numbers of an option, apart by commas.
    pub(super) fn numbers(&self, name: &str) -> Result<Vec<u32>, String> {
        let parse = |value: &str| value.parse().map_err(|_| format!("{name}={value} is not a number"));
        self.option(name).map_or(Ok(Vec::new()), |values| values.split(',').map(parse).collect())
    }

    pub(super) fn switch(&self, name: &str, usual: bool) -> Result<bool, String> {
        match self.option(name) {
            None => Ok(usual),
            Some("on") => Ok(true),
            Some("off") => Ok(false),
            Some(other) => Err(format!("{name}={other} is neither on nor off")),
        }
    }
}
