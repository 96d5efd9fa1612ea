//! Tests that do not apply to some kernels, and why.

/// A test that is left out on some kernels.
pub struct Exception {
    program: &'static str,
    /// Name, or part that names share.
    pub test: &'static str,
    /// First version that it applies to again.
    below: (u32, u32),
    /// Why.
    pub reason: &'static str,
}

const ALL: &[Exception] = &[
    Exception {
        program: "privileged",
        test: "verifier::all_programs_load_within_the_budget",
        below: (5, 16),
        reason: "the kernel does not say how many instructions its verifier went through",
    },
    Exception {
        program: "privileged",
        test: "restart::a_link_of_an_interface_that_is_gone_is_not_taken_for_a_new_one",
        below: (6, 6),
        reason: "asks the kernel for its tcx links, which it has none of",
    },
    Exception {
        program: "privileged",
        test: "attach::tcx_links_are_replaced_without_losing_a_packet",
        below: (6, 6),
        reason: "makes tcx links, which the kernel does not have",
    },
    Exception {
        program: "privileged",
        test: "attach::tcx_links_stay_links_with_an_agent_that_would_make_filters",
        below: (6, 6),
        reason: "makes tcx links, which the kernel does not have",
    },
    Exception {
        program: "privileged",
        test: "attach::filters_stay_filters_with_an_agent_that_would_make_tcx_links",
        below: (6, 6),
        reason: "makes tcx links, which the kernel does not have",
    },
    Exception {
        program: "privileged",
        test: "attach::new_interfaces_are_attached_to_as_asked_for_and_old_ones_are_left_as_they_are_tcx",
        below: (6, 6),
        reason: "makes tcx links, which the kernel does not have",
    },
    Exception {
        program: "privileged",
        test: "tunnel::many_datagrams_at_once_go_by_fou",
        below: (6, 12),
        reason: "datagrams that leave in one piece (UDP GSO) and meet no network card are lost; docs/compatibility.md",
    },
];

/// What does not apply to a kernel.
pub fn of(program: &str, version: (u32, u32)) -> impl Iterator<Item = &'static Exception> {
    ALL.iter().filter(move |exception| exception.program == program && version < exception.below)
}
