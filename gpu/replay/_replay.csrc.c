/* SPDX-License-Identifier: Apache-2.0 */
#include "replay.h"
#include "session.h"
