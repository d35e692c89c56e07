use super::*;

fn assembly(streams: u16) -> Assembly {
    Assembly::new(5, streams, [(Name::new("r").unwrap(), 4 * PAGE_BYTES)])
}

fn data(iteration: u32, sequence: u64) -> DataHeader {
    DataHeader {
        epoch: 5,
        iteration,
        sequence,
        region: 0,
        extents: 1,
        blocks: 1,
        payload: 4096,
        packed: None,
        table_crc: 0,
    }
}

fn mark(iteration: u32, sequence: u64, bytes: u64) -> MarkHeader {
    MarkHeader {
        epoch: 5,
        iteration,
        sequence,
        bytes,
        streams: 1,
    }
}

/// A mark of an epoch with two streams.
fn mark_of_two(iteration: u32, sequence: u64, bytes: u64) -> MarkHeader {
    MarkHeader {
        streams: 2,
        ..mark(iteration, sequence, bytes)
    }
}

fn range(first: u64, count: u64) -> PageRange {
    PageRange { first, count }
}

#[test]
fn a_complete_attempt_is_prepared() {
    let all = assembly(2);
    all.data(0, &data(1, 1)).unwrap().intact(range(0, 1));
    all.data(1, &data(1, 1)).unwrap().intact(range(1, 3));
    assert!(!all.mark(0, &mark_of_two(1, 2, 4096)).unwrap());
    assert!(all.mark(1, &mark_of_two(1, 2, 4096)).unwrap());
    let totals = StreamTotals {
        packets: 2,
        bytes: 4096,
    };
    all.applied(0, 2);
    all.applied(1, 2);
    assert_eq!(all.check(&[totals, totals]), Ok(()));
    assert_eq!(all.intact_bytes(), 4 * PAGE_BYTES);
    let other = StreamTotals {
        packets: 3,
        bytes: 4096,
    };
    assert!(matches!(
        all.check(&[totals, other]),
        Err(Violation::Totals { stream: 1, .. })
    ));
    assert!(all.check(&[totals]).is_err(), "a stream is missing");
}

#[test]
fn torn_or_missing_pages_are_not_prepared() {
    let all = assembly(1);
    let region = all.data(0, &data(1, 1)).unwrap();
    region.intact(range(0, 4));
    region.placing(range(2, 1));
    assert!(region.was_written(range(0, 4)) && !region.was_written(range(3, 1)));
    all.mark(0, &mark(1, 2, 4096)).unwrap();
    all.applied(0, 2);
    let totals = StreamTotals {
        packets: 2,
        bytes: 4096,
    };
    assert!(matches!(
        all.check(&[totals]),
        Err(Violation::Incomplete {
            missing: 1,
            pages: 4,
            ..
        })
    ));
}

#[test]
fn a_sender_that_commits_has_everything_in_place_and_sends_nothing_more() {
    let all = assembly(1);
    all.data(0, &data(1, 1)).unwrap().intact(range(0, 4));
    all.applied(0, 1);
    all.mark(0, &mark(1, 2, 4096)).unwrap();
    let totals = StreamTotals {
        packets: 2,
        bytes: 4096,
    };
    assert_eq!(
        all.check(&[totals]),
        Err(Violation::UnderWay {
            stream: 0,
            applied: 1,
            received: 2,
        })
    );
    all.applied(0, 2);
    assert_eq!(all.check(&[totals]), Ok(()));
    // There was more after all.
    all.data(0, &data(2, 3)).unwrap().intact(range(0, 1));
    all.applied(0, 3);
    all.mark(0, &mark(2, 4, 8192)).unwrap();
    all.applied(0, 4);
    let more = StreamTotals {
        packets: 4,
        bytes: 8192,
    };
    assert_eq!(all.check(&[more]), Ok(()));
    assert!(matches!(
        all.close(&[totals]),
        Err(Violation::Totals { stream: 0, .. })
    ));
    assert_eq!(all.close(&[more]), Ok(()));
    assert_eq!(
        all.data(0, &data(3, 5)).unwrap_err(),
        Violation::Closed {
            stream: 0,
            sequence: 5,
        }
    );
}

#[test]
fn no_page_of_the_next_iteration_before_every_stream_ended_this_one() {
    let all = assembly(2);
    all.mark(0, &mark_of_two(1, 1, 0)).unwrap();
    assert!(matches!(
        all.data(0, &data(2, 2)),
        Err(Violation::Iteration {
            found: 2,
            open: 1,
            ..
        })
    ));
    assert!(matches!(
        all.data(0, &data(1, 2)),
        Err(Violation::Iteration {
            found: 1,
            open: 1,
            ..
        })
    ));
    assert!(matches!(
        all.check(&[]),
        Err(Violation::Open {
            open: 1,
            marked: 1,
            ..
        })
    ));
    all.mark(1, &mark_of_two(1, 1, 0)).unwrap();
    assert!(all.data(0, &data(2, 2)).is_ok());
    assert!(matches!(
        all.data(1, &data(3, 2)),
        Err(Violation::Iteration { .. })
    ));
}

#[test]
fn repeated_lost_stale_and_foreign_frames_are_refused() {
    let all = assembly(1);
    all.data(0, &data(1, 1)).unwrap();
    assert!(matches!(
        all.data(0, &data(1, 1)),
        Err(Violation::Sequence {
            found: 1,
            expected: 2,
            ..
        })
    ));
    assert!(matches!(
        all.data(0, &data(1, 3)),
        Err(Violation::Sequence { found: 3, .. })
    ));
    let stale = DataHeader {
        epoch: 4,
        ..data(1, 2)
    };
    assert!(matches!(
        all.data(0, &stale),
        Err(Violation::Epoch { found: 4, .. })
    ));
    let foreign = DataHeader {
        region: 1,
        ..data(1, 2)
    };
    assert!(matches!(
        all.data(0, &foreign),
        Err(Violation::Region { region: 1, .. })
    ));
}

#[test]
fn streams_that_disagree_on_how_many_they_are_are_refused() {
    for streams in [0, 3] {
        let all = assembly(2);
        let mark = MarkHeader {
            streams,
            ..mark(1, 1, 0)
        };
        let refused = all.mark(0, &mark);
        assert!(matches!(refused, Err(Violation::Streams { known: 2, .. })));
    }
    let all = assembly(2);
    assert!(!all.mark(0, &mark_of_two(1, 1, 0)).unwrap());
    let refused = all.mark(1, &mark(1, 1, 0));
    assert!(matches!(refused, Err(Violation::Streams { found: 1, .. })));
    assert!(
        assembly(2).mark(1, &mark(1, 1, 0)).unwrap(),
        "fewer streams than offered will do"
    );
}

#[test]
fn the_next_epoch_keeps_what_arrived_and_counts_anew() {
    let all = assembly(2);
    let region = all.data(0, &data(1, 1)).unwrap();
    region.intact(range(0, 2));
    all.applied(0, 1);
    // The second packet is only half there when the connection breaks.
    all.data(0, &data(1, 2)).unwrap().placing(range(1, 2));
    assert_eq!(all.frames_applied(), [1, 0]);
    assert!(!all.is_unused(0) && all.is_unused(1));
    let missing = RegionRun {
        region: 0,
        first: 1,
        pages: 3,
    };
    assert_eq!(all.missing(), [missing]);

    let next = all.succeed(6, 2).unwrap();
    assert_eq!((next.epoch(), next.iterations()), (6, 1));
    assert_eq!(next.frames_applied(), [0, 0]);
    assert!(matches!(
        next.data(0, &data(2, 1)),
        Err(Violation::Epoch { found: 5, .. })
    ));
    let new = |header: DataHeader| DataHeader { epoch: 6, ..header };
    assert!(matches!(
        next.data(0, &new(data(1, 1))),
        Err(Violation::Iteration { found: 1, .. })
    ));
    next.data(0, &new(data(2, 1))).unwrap().intact(range(1, 3));
    let mark = MarkHeader {
        epoch: 6,
        ..mark(2, 2, 4096)
    };
    assert!(next.mark(0, &mark).unwrap());
    next.applied(0, 2);
    let totals = StreamTotals {
        packets: 2,
        bytes: 4096,
    };
    let none = StreamTotals::default();
    assert_eq!(next.check(&[totals, none]), Ok(()));
    assert!(matches!(
        next.succeed(7, 2),
        Err(Violation::Resumed { found: 2, open: 3 })
    ));
}

#[test]
fn what_is_missing_is_named_in_a_bounded_number_of_runs() {
    let pages = 4 * MISSING_RUNS_MAX as u64;
    let offered = [("a", 8), ("b", pages), ("c", 8)];
    let offered = offered.map(|(name, pages)| (Name::new(name).unwrap(), pages * PAGE_BYTES));
    let all = Assembly::new(0, 1, offered);
    for page in (0..pages).step_by(2) {
        all.regions[1].intact(range(page, 1));
    }
    let missing = all.missing();
    assert!(missing.len() <= MISSING_RUNS_MAX);
    let named = |region: u32, page: u64| {
        let mut runs = missing.iter().filter(|run| run.region == region);
        runs.any(|run| (run.first..run.first + run.pages).contains(&page))
    };
    assert!((0..8).all(|page| named(0, page) && named(2, page)));
    assert!((1..pages).step_by(2).all(|page| named(1, page)));
    assert!(missing.iter().all(|run| {
        let of = &all.regions[run.region as usize];
        run.first + run.pages <= pages_in(of.bytes)
    }));
}

#[test]
fn a_mark_that_counts_otherwise_is_refused() {
    let all = assembly(1);
    all.data(0, &data(1, 1)).unwrap();
    assert!(matches!(
        all.mark(0, &mark(1, 2, 1)),
        Err(Violation::Totals { .. })
    ));
}
