//! Times as people write them (RFC 3339) and as Loci keeps them (milliseconds since the Unix epoch, no leap seconds).

use std::ops::Range;

const DAY_MS: i64 = 86_400_000;

/// Reads `2025-03-14T09:00:00Z`, with any offset and fraction, or `2025-03-14` for its midnight in UTC. What is finer than a
/// millisecond is dropped; a leap second is read as the second after it.
pub fn parse_time(text: &str) -> Result<i64, String> {
    let bytes = text.trim().as_bytes();
    let refuse = |why: &str| format!("'{text}' is not a time: {why} (write it like 2025-03-14T09:00:00Z)");
    let number = |range: Range<usize>, least: i64, most: i64, what: &str| {
        digits(bytes, range)
            .filter(|n| (least..=most).contains(n))
            .ok_or_else(|| refuse(&format!("bad {what}")))
    };
    let is = |at: usize, allowed: &[u8]| bytes.get(at).is_some_and(|b| allowed.contains(b));

    if !is(4, b"-") || !is(7, b"-") {
        return Err(refuse("it must begin with year-month-day"));
    }
    let (year, month) = (number(0..4, 0, 9999, "year")?, number(5..7, 1, 12, "month")?);
    let day = number(8..10, 1, days_in_month(year, month), "day")?;
    let midnight_ms = days_from_civil(year, month, day) * DAY_MS;
    if bytes.len() == 10 {
        return Ok(midnight_ms);
    }

    if !is(10, b"Tt ") || !is(13, b":") || !is(16, b":") {
        return Err(refuse("after the day comes T and hour:minute:second"));
    }
    let hour = number(11..13, 0, 23, "hour")?;
    let minute = number(14..16, 0, 59, "minute")?;
    let second = number(17..19, 0, 60, "second")?;
    let mut at = 19;
    let mut fraction_ms = 0;
    if is(at, b".") {
        let length = bytes[at + 1..].iter().take_while(|b| b.is_ascii_digit()).count();
        if length == 0 {
            return Err(refuse("no digit after the decimal point"));
        }
        for (place, unit_ms) in [100, 10, 1].into_iter().enumerate().take(length) {
            fraction_ms += i64::from(bytes[at + 1 + place] - b'0') * unit_ms;
        }
        at += 1 + length;
    }

    let offset_minutes = match &bytes[at..] {
        [b'Z' | b'z'] => 0,
        [sign @ (b'+' | b'-'), _, _, b':', _, _] => {
            let minutes =
                number(at + 1..at + 3, 0, 23, "offset")? * 60 + number(at + 4..at + 6, 0, 59, "offset")?;
            if *sign == b'-' { -minutes } else { minutes }
        }
        [] => return Err(refuse("the zone is missing: end with Z or an offset such as +02:00")),
        _ => return Err(refuse("it must end with Z or an offset such as +02:00")),
    };
    Ok(midnight_ms + ((hour * 60 + minute - offset_minutes) * 60 + second) * 1000 + fraction_ms)
}

/// Writes UTC with milliseconds only where there are some: `2025-03-14T09:00:00Z`. A time outside the years 0 to 9999, which
/// RFC 3339 cannot say, is written as `… ms`.
pub fn format_time(unix_ms: i64) -> String {
    let (year, month, day) = civil_from_days(unix_ms.div_euclid(DAY_MS));
    if !(0..=9999).contains(&year) {
        return format!("{unix_ms} ms");
    }
    let ms = unix_ms.rem_euclid(DAY_MS);
    let (hour, minute, second) = (ms / 3_600_000, ms / 60_000 % 60, ms / 1000 % 60);
    let fraction = if ms % 1000 == 0 { String::new() } else { format!(".{:03}", ms % 1000) };
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}{fraction}Z")
}

fn digits(bytes: &[u8], range: Range<usize>) -> Option<i64> {
    bytes.get(range)?.iter().try_fold(0, |n, b| b.is_ascii_digit().then(|| n * 10 + i64::from(b - b'0')))
}

fn days_in_month(year: i64, month: i64) -> i64 {
    match month {
        2 if year % 4 == 0 && (year % 100 != 0 || year % 400 == 0) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Days from 1970-01-01 to a date of the Gregorian calendar. The year is taken to begin in March, so that the leap day is its
/// last, and the months since March have (153 m + 2) / 5 days before them.
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    365 * year + year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400) + day_of_year - 719_468
}

/// The inverse of [`days_from_civil`].
fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468; // since 0000-03-01
    let (cycle, day) = (days.div_euclid(146_097), days.rem_euclid(146_097)); // cycles of 400 years
    let year_of_cycle = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day_of_year = day - (365 * year_of_cycle + year_of_cycle / 4 - year_of_cycle / 100);
    let months = (5 * day_of_year + 2) / 153;
    let month = (months + 2) % 12 + 1;
    let year = cycle * 400 + year_of_cycle + i64::from(month <= 2);
    (year, month, day_of_year - (153 * months + 2) / 5 + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_times_are_read_and_written() {
        for (text, ms) in [
            ("1970-01-01T00:00:00Z", 0),
            ("1969-12-31T23:59:59.999Z", -1),
            ("2000-02-29T12:34:56Z", 951_827_696_000),
            ("2025-03-14T09:00:00Z", 1_741_942_800_000),
            ("9999-12-31T23:59:59.999Z", 253_402_300_799_999),
            ("0000-01-01T00:00:00Z", -62_167_219_200_000),
        ] {
            assert_eq!(parse_time(text), Ok(ms), "{text}");
            assert_eq!(format_time(ms), text);
        }
    }

    #[test]
    fn other_ways_to_write_the_same_moment() {
        for text in [
            "2025-03-14T11:00:00+02:00",
            "2025-03-14 03:30:00-05:30",
            "2025-03-14t09:00:00.0009z",
            " 2025-03-14T08:59:60Z ",
        ] {
            assert_eq!(parse_time(text), Ok(1_741_942_800_000), "{text}");
        }
        assert_eq!(parse_time("2025-03-14"), parse_time("2025-03-14T00:00:00Z"));
    }

    #[test]
    fn what_is_no_time_is_refused_with_its_reason() {
        for (text, why) in [
            ("", "year-month-day"),
            ("1741942800000", "year-month-day"),
            ("2025-13-01", "bad month"),
            ("2025-02-29", "bad day"),
            ("2025-03-14T9:00:00Z", "hour:minute:second"),
            ("2025-03-14T24:00:00Z", "bad hour"),
            ("2025-03-14T09:00:00", "zone is missing"),
            ("2025-03-14T09:00:00.Z", "no digit"),
            ("2025-03-14T09:00:00+0200", "offset such as"),
            ("2025-03-14T09:00:00+02:99", "bad offset"),
            ("2O25-03-14T09:00:00Z", "bad year"),
            ("2025-03-1é", "bad day"),
        ] {
            let error = parse_time(text).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn a_time_beyond_the_calendar_is_still_written() {
        assert_eq!(format_time(i64::MAX), "9223372036854775807 ms");
        assert_eq!(format_time(i64::MIN), "-9223372036854775808 ms");
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back(ms in -62_167_219_200_000i64..=253_402_300_799_999) {
            prop_assert_eq!(parse_time(&format_time(ms)), Ok(ms));
        }

        #[test]
        fn no_text_panics(text in "[0-9TZ:+. é-]{0,32}") {
            let _ = parse_time(&text);
        }
    }
}
